"""Say why each open row of one side has no match, judged against every row of the other side.

The reasons narrow down: a row gets the first of no_key_match, currency_mismatch, amount_out_of_tolerance and
outside_date_window that is true of it. If none is, a partner existed and went to a better pair: already_matched.
Amounts are judged row against row; that a sum would have fitted is not looked at again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from settler_streams.core.matching import Reason, Rules
from settler_streams.reconciliation.sources import key_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def explain(
    open_rows: pl.DataFrame,
    others: pl.DataFrame,
    undecided: Sequence[int],
    rules: Rules,
    checkpoint: Callable[[], None],
) -> pl.DataFrame:
    """Add ``reason`` to the open rows.

    Args:
        open_rows: unmatched rows of one side, with ``n``, ``gid``, ``amount``, ``day`` and the key columns.
        others: all rows of the other side, matched ones included.
        undecided: row numbers that a step limit left open.
    """
    grouped = open_rows.filter(pl.col("gid").is_not_null())
    priced = _within_tolerance(grouped, others, rules, checkpoint)
    keyed = _with_keys(open_rows, others, rules)
    return open_rows.with_columns(
        reason=pl.when(pl.col("n").is_in(pl.Series(undecided, dtype=pl.UInt32).implode()))
        .then(pl.lit(Reason.SEARCH_LIMIT.value))
        .when(pl.col("n").is_in(priced.filter(pl.col("dated"))["n"].implode()))
        .then(pl.lit(Reason.ALREADY_MATCHED.value))
        .when(pl.col("n").is_in(priced["n"].implode()))
        .then(pl.lit(Reason.OUTSIDE_DATE_WINDOW.value))
        .when(pl.col("gid").is_not_null())
        .then(pl.lit(Reason.AMOUNT_OUT_OF_TOLERANCE.value))
        .when(pl.col("n").is_in(keyed["n"].implode()))
        .then(pl.lit(Reason.CURRENCY_MISMATCH.value))
        .otherwise(pl.lit(Reason.NO_KEY_MATCH.value))
    )


def _with_keys(rows: pl.DataFrame, others: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """The rows whose keys some other row has, in whatever currency."""
    if not rules.keys:
        return rows if others.height else rows.clear()
    return rows.join(others, on=key_columns(rules.keys), how="semi")


def _within_tolerance(
    rows: pl.DataFrame, others: pl.DataFrame, rules: Rules, checkpoint: Callable[[], None]
) -> pl.DataFrame:
    """The rows that some other row's amount fits: ``n``, and ``dated`` when one such row is in the window as well."""
    tolerance, window = rules.amount_tolerance_minor, rules.date_window_days
    others = others.filter(pl.col("gid").is_not_null()).select("gid", "amount", "day").unique().sort("amount")
    near = _nearest(rows.select("n", "gid", "amount", "day"), others, ["gid"], tolerance)
    dated = (pl.col("day") - pl.col("other_day")).abs() <= window
    settled = [near.filter(dated).select("n", dated=pl.lit(value=True))]
    unsure = near.filter(~dated).select("n", "gid", "amount", "day")
    # The nearest amount lies outside the window, but another that fits may not: look at each day of the window.
    days = others.select("gid", "day").unique()
    for offset in range(-window, window + 1):
        if unsure.is_empty():
            break
        checkpoint()
        moved = unsure.with_columns(day=pl.col("day") + offset).join(days, on=["gid", "day"], how="semi")
        if moved.is_empty():
            continue
        hit = _nearest(moved, others, ["gid", "day"], tolerance)
        settled.append(hit.select("n", dated=pl.lit(value=True)))
        unsure = unsure.join(hit, on="n", how="anti")
    return pl.concat([*settled, unsure.select("n", dated=pl.lit(value=False))])


def _nearest(rows: pl.DataFrame, others: pl.DataFrame, by: list[str], tolerance: int) -> pl.DataFrame:
    """The rows whose nearest other amount, among those equal in ``by``, is within the tolerance; with its day."""
    candidates = others.select(*by, "amount", other_amount="amount", other_day="day")
    return (
        rows.sort("amount")
        .join_asof(candidates, on="amount", by=by, strategy="nearest", check_sortedness=False)
        .filter((pl.col("amount") - pl.col("other_amount")).abs() <= tolerance)
    )
