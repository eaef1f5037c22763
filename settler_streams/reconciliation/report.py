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


def check_balance(report: Report, matches: pl.DataFrame) -> None:
    """Raise unless total = matched + unmatched everywhere, in rows and minor units, and the differences add up."""
    for name, side in (("left", report.left), ("right", report.right)):
        if side.rows != side.matched_rows + side.unmatched_rows:
            raise StateError(f"{name}: {side.rows} rows are not {side.matched_rows} + {side.unmatched_rows}")
        if side.unmatched_rows != sum(side.reasons.values()):
            raise StateError(f"{name}: {side.unmatched_rows} unmatched rows have {sum(side.reasons.values())} reasons")
        crossed = _crossed(matches, name)
        differences = {entry.currency: entry for entry in report.differences}
        for totals in side.currencies:
            if totals.total_minor != totals.matched_minor + totals.unmatched_minor:
                raise StateError(f"{name}, {totals.currency}: the amounts do not balance: {totals}")
            if totals.rows != totals.matched_rows + totals.unmatched_rows:
                raise StateError(f"{name}, {totals.currency}: the rows do not balance: {totals}")
            entry = differences.get(totals.currency)
            same_minor = 0 if entry is None else entry.left_minor if name == "left" else entry.right_minor
            if totals.matched_minor != same_minor + crossed.get(totals.currency, 0):
                raise StateError(f"{name}, {totals.currency}: the matches do not add up to {totals.matched_minor}")
    for entry in report.differences:
        if entry.left_minor - entry.right_minor != entry.difference_minor:
            raise StateError(f"{entry.currency}: the differences do not add up: {entry}")


def _crossed(matches: pl.DataFrame, side: str) -> dict[str, int]:
    """The sum that matches across currencies take from each currency of one side."""
    crossed = matches.filter(pl.col("difference_minor").is_null())
    return dict(crossed.group_by(f"{side}_currency").agg(pl.col(f"{side}_amount_minor").sum()).iter_rows())


def _side(records: RecordSet, matched: pl.DataFrame, unmatched: pl.DataFrame) -> SideReport:
    money = ["currency", "amount"]
    readable = pl.concat([records.rows.select(money), records.duplicates.select(money)])
    # Invalid rows have no currency and stay outside of the sums.
    open_money = unmatched.filter(pl.col("currency").is_not_null()).select("currency", amount="amount_minor")
    columns = ["rows", "total_minor", "matched_rows", "matched_minor", "unmatched_rows", "unmatched_minor"]
    sums = _sums(readable, "rows", "total_minor")
    for part in (
        _sums(matched.select(money), "matched_rows", "matched_minor"),
        _sums(open_money, "unmatched_rows", "unmatched_minor"),
    ):
        sums = sums.join(part, on="currency", how="full", coalesce=True)
    sums = sums.with_columns(pl.col(columns).fill_null(0)).sort("currency")
    return SideReport(
        rows=records.height,
        matched_rows=matched.height,
        unmatched_rows=unmatched.height,
        invalid_rows=records.invalid.height,
        reasons=dict(unmatched.group_by("reason").len().sort("reason").iter_rows()),
        currencies=tuple(CurrencyTotals(**row) for row in sums.iter_rows(named=True)),
    )


def _sums(rows: pl.DataFrame, count: str, total: str) -> pl.DataFrame:
    return rows.group_by("currency").agg(pl.len().alias(count), pl.col("amount").sum().alias(total))
