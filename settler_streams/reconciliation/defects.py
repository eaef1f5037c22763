"""What can be wrong with a row or a record set, and the words for it."""

from __future__ import annotations

import enum

from settler_streams.errors import InvalidRequestError

TEXT_CHARS_MAX = 256
"""Longest id or key: more than any bank's reference (35 in ISO 20022), and well below an index entry's limit."""

TOTAL_MINOR_MAX = 2**62 - 1
"""Largest sum of absolute amounts of one side and currency: every later sum and difference then fits in 64 bits."""


class Defect(enum.StrEnum):
    """Why a row is invalid."""

    ID_MISSING = "id: missing"
    CURRENCY = "currency: not a three-letter code"
    AMOUNT_MISSING = "amount: missing"
    AMOUNT_TWICE = "amount: give one of amount and amount_minor"
    AMOUNT_TEXT = "amount: not a plain decimal"
    AMOUNT_DIGITS = "amount: more fractional digits than the currency has"
    AMOUNT_MINOR_TEXT = "amount_minor: not an integer"
    AMOUNT_SIZE = "amount: beyond 64 bits"
    DATE = "date: not an ISO 8601 date"


def holds_nul(column: str) -> str:
    """The defect of a text that Postgres cannot store."""
    return f"{column}: holds U+0000"


def too_long(column: str) -> str:
    """The defect of a text of more than ``TEXT_CHARS_MAX`` characters."""
    return f"{column}: longer than {TEXT_CHARS_MAX} characters"


def check_total(currency: str, total_minor: int) -> None:
    """Refuse a side whose absolute amounts of one currency add up to too much.

    Raises:
        InvalidRequestError: ``total_minor`` is above ``TOTAL_MINOR_MAX``.
    """
    if total_minor > TOTAL_MINOR_MAX:
        raise InvalidRequestError(f"the amounts in {currency} add up to more than {TOTAL_MINOR_MAX} minor units")
