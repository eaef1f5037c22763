"""The totals of a reconciliation, and the proof that they balance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import polars as pl

from settler_streams.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from settler_streams.reconciliation.records import RecordSet


class CurrencyTotals(msgspec.Struct, frozen=True, kw_only=True):
    """One side and currency: row counts, and sums in minor units. Rows that could not be read are not in here."""

    currency: str
    rows: int
    total_minor: int
    matched_rows: int
    matched_minor: int
    unmatched_rows: int
    unmatched_minor: int


class SideReport(msgspec.Struct, frozen=True, kw_only=True):
    """One side: ``rows`` counts every row as given, the invalid ones included."""

    rows: int
    matched_rows: int
    unmatched_rows: int
    invalid_rows: int
    reasons: dict[str, int]
    currencies: tuple[CurrencyTotals, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Matches within one currency: left minus right, in minor units."""

    currency: str
    matches: int
    left_minor: int
    right_minor: int
    difference_minor: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides, the matches by kind, and what the matches differ by. Every integer fits in 64 bits."""

    left: SideReport
    right: SideReport
    matches: dict[str, int]
    differences: tuple[Difference, ...]


Sums = dict[str, tuple[int, int]]
"""By currency: how many rows, and their sum in minor units."""


def build_report(
    sides: Sequence[RecordSet], matches: pl.DataFrame, matched: Sequence[pl.DataFrame], unmatched: pl.DataFrame
) -> Report:
    """Count and add up.

    Total, matched and unmatched come from three different tables (the rows as parsed, the matched row numbers, the
    unmatched rows), so that their balance means something.

    Raises:
        StateError: the report does not balance; the result must not be used.
    """
    left, right = (
        _side(records, numbers, unmatched.filter(pl.col("side") == name))
        for name, records, numbers in zip(("left", "right"), sides, matched, strict=True)
    )
    kinds = matches.group_by("kind").len().sort("kind")
    same = matches.filter(pl.col("difference_minor").is_not_null())
    sums = same.group_by(pl.col("left_currency").alias("currency")).agg(
        matches=pl.len(),
        left_minor=pl.col("left_amount_minor").sum(),
        right_minor=pl.col("right_amount_minor").sum(),
        difference_minor=pl.col("difference_minor").sum(),
    )
    report = Report(
        left=left,
        right=right,
        matches=dict(kinds.iter_rows()),
        differences=tuple(Difference(**row) for row in sums.sort("currency").iter_rows(named=True)),
    )
    check_balance(report, matches)
    return report


def side_report(
    *, invalid_rows: int, reasons: dict[str, int], readable: Sums, matched: Sums, unmatched: Sums
) -> SideReport:
    """Put the sums of one side together. Invalid rows have no currency and are in none of them."""
    none = (0, 0)
    return SideReport(
        rows=invalid_rows + sum(rows for rows, _ in readable.values()),
        matched_rows=sum(rows for rows, _ in matched.values()),
        unmatched_rows=invalid_rows + sum(rows for rows, _ in unmatched.values()),
        invalid_rows=invalid_rows,
        reasons=dict(sorted(reasons.items())),
        currencies=tuple(
            CurrencyTotals(
                currency=currency,
                rows=readable.get(currency, none)[0],
                total_minor=readable.get(currency, none)[1],
                matched_rows=matched.get(currency, none)[0],
                matched_minor=matched.get(currency, none)[1],
                unmatched_rows=unmatched.get(currency, none)[0],
                unmatched_minor=unmatched.get(currency, none)[1],
            )
            for currency in sorted(readable.keys() | matched.keys() | unmatched.keys())
        ),
    )


def check_balance(report: Report, matches: pl.DataFrame) -> None:
    """:func:`check_sums` of a table of matches."""
    crossed = matches.filter(pl.col("difference_minor").is_null())
    check_sums(report, *(_sums(crossed, f"{side}_currency", f"{side}_amount_minor") for side in ("left", "right")))


def check_sums(report: Report, crossed_left: Sums, crossed_right: Sums) -> None:
    """Raise unless total = matched + unmatched everywhere, in rows and minor units, and the differences add up.

    Args:
        crossed_left, crossed_right: what the matches across currencies take from each side.

    Raises:
        StateError: the report does not balance; the result must not be used.
    """
    for name, side, crossed in (("left", report.left, crossed_left), ("right", report.right, crossed_right)):
        if side.rows != side.matched_rows + side.unmatched_rows:
            raise StateError(f"{name}: {side.rows} rows are not {side.matched_rows} + {side.unmatched_rows}")
        if side.unmatched_rows != sum(side.reasons.values()):
            raise StateError(f"{name}: {side.unmatched_rows} unmatched rows have {sum(side.reasons.values())} reasons")
        differences = {entry.currency: entry for entry in report.differences}
        for totals in side.currencies:
            if totals.total_minor != totals.matched_minor + totals.unmatched_minor:
                raise StateError(f"{name}, {totals.currency}: the amounts do not balance: {totals}")
            if totals.rows != totals.matched_rows + totals.unmatched_rows:
                raise StateError(f"{name}, {totals.currency}: the rows do not balance: {totals}")
            entry = differences.get(totals.currency)
            same_minor = 0 if entry is None else entry.left_minor if name == "left" else entry.right_minor
            if totals.matched_minor != same_minor + crossed.get(totals.currency, (0, 0))[1]:
                raise StateError(f"{name}, {totals.currency}: the matches do not add up to {totals.matched_minor}")
    for entry in report.differences:
        if entry.left_minor - entry.right_minor != entry.difference_minor:
            raise StateError(f"{entry.currency}: the differences do not add up: {entry}")


def _side(records: RecordSet, matched: pl.DataFrame, unmatched: pl.DataFrame) -> SideReport:
    money = ["currency", "amount"]
    return side_report(
        invalid_rows=records.invalid.height,
        reasons=dict(unmatched.group_by("reason").len().iter_rows()),
        readable=_sums(pl.concat([records.rows.select(money), records.duplicates.select(money)]), *money),
        matched=_sums(matched, *money),
        unmatched=_sums(unmatched.filter(pl.col("currency").is_not_null()), "currency", "amount_minor"),
    )


def _sums(rows: pl.DataFrame, currency: str, amount: str) -> Sums:
    sums = rows.group_by(currency).agg(pl.len().alias("_rows"), pl.col(amount).sum().alias("_minor"))
    return {name: (count, total) for name, count, total in sums.iter_rows()}
