"""The rules of a reconciliation, and the words of its result."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

import msgspec

from settler_streams.errors import InvalidRequestError

AMOUNT_TOLERANCE_MINOR_MAX = 10**15
"""Far above any fee, and far enough below 2**62 that an amount plus or minus it stays within 64 bits."""

DATE_WINDOW_DAYS_MAX = 3660
"""Ten years, as the published request has it. Searches look at the days that occur, within their limits of steps."""

GROUP_SIZE_LIMIT = 16
"""Larger groups make a chance sum likelier than a true one, and the search grows with the group size."""

KEYS_MAX = 8
"""More key columns than any reconciliation needs; bounds the width of the joins."""

KEY_LENGTH_MAX = 4000
"""Of a column's name, as the published request has it. Inside, key columns have names of their own."""

RESERVED_COLUMNS = frozenset({"id", "amount", "amount_minor", "currency", "date"})
"""Columns that have rules of their own and therefore cannot be match keys."""

Mode = Literal["one_to_one", "one_to_many"]


class Kind(enum.StrEnum):
    """How a match came about."""

    ONE_TO_ONE = "one_to_one"
    ONE_TO_MANY = "one_to_many"
    CROSS_CURRENCY = "cross_currency"


class Reason(enum.StrEnum):
    """Why a row has no match, from the widest cause to the narrowest."""

    INVALID_ROW = "invalid_row"
    DUPLICATE_ID = "duplicate_id"
    NO_KEY_MATCH = "no_key_match"
    CURRENCY_MISMATCH = "currency_mismatch"
    AMOUNT_OUT_OF_TOLERANCE = "amount_out_of_tolerance"
    OUTSIDE_DATE_WINDOW = "outside_date_window"
    ALREADY_MATCHED = "already_matched"
    SEARCH_LIMIT = "search_limit"


class Row(NamedTuple):
    """One row of a group, reduced to what a decision needs."""

    number: int
    """Position of the row in the order of its side's ids: unique, and the tie-breaker."""
    amount_minor: int
    day: int
    """Days since 1970-01-01."""


class Rules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When two rows match.

    Rows match only when every key column is present and equal, the amounts differ by at most
    ``amount_tolerance_minor`` minor units, and the dates by at most ``date_window_days`` days. Without keys every
    row of a currency is comparable.

    Amounts of different currencies are never compared: no exchange rate is known here. ``currency_must_match=False``
    therefore does one thing only: when, after all other matching, exactly one row is left on each side with the same
    keys, and their currencies differ, the two match by keys and dates alone, as kind ``cross_currency`` without a
    difference. That needs at least one key.

    ``one_to_many`` first matches one to one, then lets one left row settle 2 to ``group_size_max`` right rows.

    Raises:
        InvalidRequestError: a rule is outside of its bounds.
    """

    keys: tuple[str, ...] = ()
    amount_tolerance_minor: int = 0
    date_window_days: int = 0
    currency_must_match: bool = True
    mode: Mode = "one_to_one"
    group_size_max: int = 8

    def __post_init__(self) -> None:
        if len(self.keys) > KEYS_MAX or len(set(self.keys)) != len(self.keys):
            raise InvalidRequestError(f"rules.keys: give at most {KEYS_MAX} different columns")
        for key in self.keys:
            if not 0 < len(key) <= KEY_LENGTH_MAX or not key.isprintable() or key[0] == "_" or key in RESERVED_COLUMNS:
                raise InvalidRequestError(f"rules.keys: {key!r} cannot be a match key")
        _within("amount_tolerance_minor", self.amount_tolerance_minor, 0, AMOUNT_TOLERANCE_MINOR_MAX)
        _within("date_window_days", self.date_window_days, 0, DATE_WINDOW_DAYS_MAX)
        _within("group_size_max", self.group_size_max, 2, GROUP_SIZE_LIMIT)
        if self.mode not in ("one_to_one", "one_to_many"):
            raise InvalidRequestError(f"rules.mode: {self.mode!r} is neither one_to_one nor one_to_many")
        if not self.currency_must_match and not self.keys:
            raise InvalidRequestError("rules.currency_must_match: matching across currencies needs at least one key")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"rules.{name}: {value} is not between {low} and {high}")
