"""Say why each open row of one side has no match, judged against every row of the other side.

The reasons narrow down: a row gets the first of no_key_match, currency_mismatch, amount_out_of_tolerance and
outside_date_window that is true of it. If none is, a partner existed and went to a better pair: already_matched.
Amounts are judged row against row; that a sum would have fitted is not looked at again.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import polars as pl

from settler_streams.core.matching import Reason, Rules
from settler_streams.reconciliation.sources import key_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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
    others = others.filter(pl.col("gid").is_not_null()).select("gid", "amount", "day").unique().sort("amount")
    near = _nearest(rows.select("n", "gid", "amount", "day"), others, rules.amount_tolerance_minor)
    dated = (pl.col("day") - pl.col("other_day")).abs() <= rules.date_window_days
    # The nearest amount may lie outside the window, and another that fits within it.
    unsure = near.filter(~dated)
    fitting = [] if unsure.is_empty() else list(_in_window(unsure, others, rules, checkpoint))
    dated_rows = pl.concat([near.filter(dated).select("n"), *fitting])["n"]
    return near.select("n", dated=pl.col("n").is_in(dated_rows.implode()))


def _in_window(
    rows: pl.DataFrame, others: pl.DataFrame, rules: Rules, checkpoint: Callable[[], None]
) -> Iterator[pl.DataFrame]:
    """``n`` of the rows that some other row fits in amount and day; four joins, however wide the window.

    Amounts are divided into stretches as long as the range that fits a row: each such range is the end of one stretch
    and the beginning of the next. So are days. Of the four cells of amounts and days that a row's ranges reach into,
    each holds a fitting row if the farthest day among the amounts from the range's bound on is far enough. A beginning
    is an end when counted backwards.
    """
    tolerance, window = rules.amount_tolerance_minor, rules.date_window_days
    cell = ["gid", "amounts", "days"]
    stretches = (
        (pl.col("amount") // (2 * tolerance + 1)).alias("amounts"),
        (pl.col("day") // (2 * window + 1)).alias("days"),
    )
    for amount, day in product(*((pl.col(name), -1 - pl.col(name)) for name in ("amount", "day"))):
        checkpoint()
        farthest = (
            others.select("gid", amount=amount, day=day)
            .group_by("gid", "amount", *stretches)
            .agg(farthest=pl.col("day").max())
            .sort("amount")
            .with_columns(pl.col("farthest").cum_max(reverse=True).over(cell))
        )
        yield (
            rows.select("n", "gid", amount=amount - tolerance, day=day - window)
            .with_columns(*stretches)
            .sort("amount")
            .join_asof(farthest, on="amount", by=cell, strategy="forward", check_sortedness=False)
            .filter(pl.col("farthest") >= pl.col("day"))
            .select("n")
        )


def _nearest(rows: pl.DataFrame, others: pl.DataFrame, tolerance: int) -> pl.DataFrame:
    """The rows whose nearest other amount in their group is within the tolerance; with its day."""
    candidates = others.select("gid", "amount", other_amount="amount", other_day="day")
    return (
        rows.sort("amount")
        .join_asof(candidates, on="amount", by="gid", strategy="nearest", check_sortedness=False)
        .filter((pl.col("amount") - pl.col("other_amount")).abs() <= tolerance)
    )
