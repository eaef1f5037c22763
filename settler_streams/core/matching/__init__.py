"""Reconciliation matching: which rows of two record sets settle each other.

The decisions are pure and work on one group of rows at a time; ``settler_streams.reconciliation`` finds the groups.

* :func:`assign` pairs rows one to one, best pair first;
* :func:`settle` lets one payment settle several invoices, by a bounded subset-sum search.

Both count their steps and stop at a limit. Rows that the limit left open are named, never guessed.
"""

from settler_streams.core.matching.one_to_many import Settlement, settle
from settler_streams.core.matching.one_to_one import Assignment, assign
from settler_streams.core.matching.rules import (
    AMOUNT_TOLERANCE_MINOR_MAX,
    DATE_WINDOW_DAYS_MAX,
    GROUP_SIZE_LIMIT,
    KEYS_MAX,
    Kind,
    Mode,
    Reason,
    Row,
    Rules,
)

__all__ = [
    "AMOUNT_TOLERANCE_MINOR_MAX",
    "DATE_WINDOW_DAYS_MAX",
    "GROUP_SIZE_LIMIT",
    "KEYS_MAX",
    "Assignment",
    "Kind",
    "Mode",
    "Reason",
    "Row",
    "Rules",
    "Settlement",
    "assign",
    "settle",
]
