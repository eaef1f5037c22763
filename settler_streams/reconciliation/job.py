"""Reconcile two record sets: read, parse, match, explain, add up.

Synchronous and bound by the processor: call it in a worker process, or in a thread (the table work releases the GIL,
the decisions on ambiguous components do not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from settler_streams.core.matching import Kind, Reason, Rules
from settler_streams.errors import Disposition, SettlerError
from settler_streams.reconciliation.pairing import Pairing, find_matches
from settler_streams.reconciliation.reasons import explain
from settler_streams.reconciliation.records import RecordSet, parse_records
from settler_streams.reconciliation.report import Report, build_report
from settler_streams.reconciliation.sources import Source, read_source

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from settler_streams.ids import TenantId

CHUNK_ROWS = 5_000
"""Rows per chunk: a statement of about 1 MB."""


class ReconciliationCancelledError(SettlerError):
    """The caller asked to stop; nothing was changed."""

    disposition = Disposition.RETRY


@dataclass(frozen=True, slots=True)
class MatchChunk:
    """Columns of equal length, one entry per match.

    ``difference_minor`` is left minus right, and None across currencies. ``match_no`` counts from 1 in the order of
    the left rows, so a repeated attempt gives the same numbers.
    """

    match_no: list[int]
    kind: list[str]
    left_id: list[str]
    right_ids: list[list[str]]
    left_currency: list[str]
    right_currency: list[str]
    left_amount_minor: list[int]
    right_amount_minor: list[int]
    difference_minor: list[int | None]


@dataclass(frozen=True, slots=True)
class UnmatchedChunk:
    """Columns of equal length, one entry per unmatched row.

    ``row`` is the position in the set, from 1. An invalid row has a ``detail``, and no currency, amount or date.
    """

    side: list[str]
    row: list[int]
    row_id: list[str | None]
    currency: list[str | None]
    amount_minor: list[int | None]
    date: list[dt.date | None]
    reason: list[str]
    detail: list[str | None]


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The result: two tables, whose columns are those of the chunks, and a report that balances."""

    matches: pl.DataFrame
    unmatched: pl.DataFrame
    report: Report

    def match_chunks(self, rows_max: int = CHUNK_ROWS) -> Iterator[MatchChunk]:
        """The matches as Python lists, at most ``rows_max`` at a time."""
        for part in self.matches.iter_slices(rows_max):
            yield MatchChunk(**part.to_dict(as_series=False))

    def unmatched_chunks(self, rows_max: int = CHUNK_ROWS) -> Iterator[UnmatchedChunk]:
        """The unmatched rows as Python lists, left side first, in the order of the set."""
        for part in self.unmatched.iter_slices(rows_max):
            yield UnmatchedChunk(**part.to_dict(as_series=False))


def reconcile(
    left: Source,
    right: Source,
    rules: Rules,
    *,
    tenant: TenantId,
    record_sets_dir: Path,
    cancelled: Callable[[], bool] = lambda: False,
) -> Reconciliation:
    """Match the left record set (payments, ledger) with the right one (invoices, statement).

    Args:
        cancelled: asked between stages and components; when true, the work is abandoned.

    Guarantee: equal inputs give equal results, in equal order. Every row of both sets is in exactly one match or is
    unmatched with a reason. Time and memory are bounded (see ``pairing``).

    Raises:
        InvalidRequestError: a source cannot be read, or lies outside of the tenant's directory.
        ReconciliationCancelledError: ``cancelled`` became true.
        StateError: the report does not balance.
    """

    def checkpoint() -> None:
        if cancelled():
            raise ReconciliationCancelledError("the reconciliation was cancelled; submit it again to have a result")

    def records(source: Source) -> RecordSet:
        checkpoint()
        raw = read_source(source, rules.keys, tenant=tenant, record_sets_dir=record_sets_dir)
        return parse_records(raw, rules.keys)

    sets = records(left), records(right)
    checkpoint()
    pairing = find_matches(*sets, rules, checkpoint)
    checkpoint()
    matches = _matches(pairing)
    unmatched = _unmatched(sets, pairing, rules, checkpoint)
    matched = [
        rows.filter(pl.col("n").is_in(pairing.used(side).implode()))
        for side, rows in (("l", pairing.left), ("r", pairing.right))
    ]
    return Reconciliation(matches, unmatched, build_report(sets, matches, matched, unmatched))


def _matches(pairing: Pairing) -> pl.DataFrame:
    kinds = (
        (pairing.singles, Kind.ONE_TO_ONE),
        (pairing.groups, Kind.ONE_TO_MANY),
        (pairing.crossed, Kind.CROSS_CURRENCY),
    )
    pairs = pl.concat(pairs.with_columns(kind=pl.lit(kind.value)) for pairs, kind in kinds)
    difference = pl.col("left_amount_minor") - pl.col("right_amount_minor")
    lefts = pairing.left.select("n", "row", "id", "currency", "amount")
    return (
        pairs.join(pairing.right.select("n", "id", "currency", "amount"), left_on="r", right_on="n")
        .sort("l", "r")
        .group_by("l", "kind", maintain_order=True)
        .agg(
            right_ids="id",
            right_currency=pl.col("currency").first(),
            right_amount_minor=pl.col("amount").sum(),
        )
        .join(lefts, left_on="l", right_on="n")
        .sort("row")
        .with_row_index("match_no", offset=1)
        .rename({"id": "left_id", "currency": "left_currency", "amount": "left_amount_minor"})
        .with_columns(difference_minor=pl.when(pl.col("left_currency") == pl.col("right_currency")).then(difference))
        .select(*MatchChunk.__slots__)
    )


def _unmatched(
    sets: tuple[RecordSet, RecordSet], pairing: Pairing, rules: Rules, checkpoint: Callable[[], None]
) -> pl.DataFrame:
    open_left, open_right = pairing.open_rows()
    parts: list[pl.DataFrame] = []
    for side, records, rows, others, undecided in (
        ("left", sets[0], open_left, pairing.right, pairing.undecided_left),
        ("right", sets[1], open_right, pairing.left, pairing.undecided_right),
    ):
        checkpoint()
        reasons = (
            explain(rows, others, undecided, rules, checkpoint).with_columns(detail=pl.lit(None, pl.String)),
            records.duplicates.with_columns(reason=pl.lit(Reason.DUPLICATE_ID.value)),
            records.invalid.with_columns(reason=pl.lit(Reason.INVALID_ROW.value)),
        )
        joined = pl.concat(reasons, how="diagonal").sort("row")
        parts.append(
            joined.select(
                pl.lit(side).alias("side"),
                "row",
                pl.col("id").alias("row_id"),
                "currency",
                pl.col("amount").alias("amount_minor"),
                pl.col("day").cast(pl.Date).alias("date"),
                "reason",
                "detail",
            )
        )
    return pl.concat(parts)
