"""Reconcile two record sets: read, parse, match, explain, add up.

Two sets of at most ``SMALL_ROWS_MAX`` rows are handled row by row (the ``small_`` modules), all others as tables. The
result is the same, to the bit.

Synchronous and bound by the processor: call it in a worker process, or in a thread (the table work releases the GIL,
the rest does not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from settler_streams.core.matching import Kind, Reason, Rules
from settler_streams.errors import Disposition, SettlerError
from settler_streams.reconciliation.pairing import Pairing, find_matches
from settler_streams.reconciliation.reasons import explain
from settler_streams.reconciliation.records import RecordSet, as_table, parse_records
from settler_streams.reconciliation.report import build_report
from settler_streams.reconciliation.result import MATCHES, Reconciliation
from settler_streams.reconciliation.small_job import reconcile_small
from settler_streams.reconciliation.small_records import SmallSet, parse_small
from settler_streams.reconciliation.sources import Source, read_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from settler_streams.ids import TenantId

SMALL_ROWS_MAX = 1_000
"""Rows of a set that is handled row by row. Tables take 20 to 40 ms before they see a row; here a row takes about
12 us. The two meet at some 2,500 rows a side, and at some 700 for a set made to be slow (see ``small_reasons``)."""


class ReconciliationCancelledError(SettlerError):
    """The caller asked to stop; nothing was changed."""

    disposition = Disposition.RETRY


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

    def records(source: Source) -> RecordSet | SmallSet:
        checkpoint()
        raw = read_source(source, rules.keys, tenant=tenant, record_sets_dir=record_sets_dir)
        rows = raw.height if isinstance(raw, pl.DataFrame) else len(raw["id"])
        if rows <= SMALL_ROWS_MAX:
            return parse_small(raw, rules.keys)
        # Bound anew, so that the lists of a large set are gone before it is parsed.
        raw = as_table(raw)
        return parse_records(raw, rules.keys)

    left_set, right_set = records(left), records(right)
    checkpoint()
    if isinstance(left_set, SmallSet) and isinstance(right_set, SmallSet):
        return reconcile_small(left_set, right_set, rules, checkpoint)
    sets = _as_tables(left_set, rules), _as_tables(right_set, rules)
    pairing = find_matches(*sets, rules, checkpoint)
    checkpoint()
    matches = _matches(pairing)
    unmatched = _unmatched(sets, pairing, rules, checkpoint)
    matched = [
        rows.filter(pl.col("n").is_in(pairing.used(side).implode()))
        for side, rows in (("l", pairing.left), ("r", pairing.right))
    ]
    return Reconciliation(matches, unmatched, build_report(sets, matches, matched, unmatched))


def _as_tables(records: RecordSet | SmallSet, rules: Rules) -> RecordSet:
    return records.as_tables(rules.keys) if isinstance(records, SmallSet) else records


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
        .select(*MATCHES)
    )


def _unmatched(
    sets: tuple[RecordSet, RecordSet], pairing: Pairing, rules: Rules, checkpoint: Callable[[], None]
) -> pl.DataFrame:
    open_left, open_right = pairing.open_rows()
    parts: list[pl.DataFrame] = []
    for side, records, rows, others, undecided in (
        ("left", sets[0], open_left, pairing.right, pairing.decisions.undecided_left),
        ("right", sets[1], open_right, pairing.left, pairing.decisions.undecided_right),
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
