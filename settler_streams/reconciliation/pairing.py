"""Find the matches of two record sets: table joins around the pure decisions.

Stages, each linear or n log n in the rows:

1. Rows with equal keys and currency share a group (a hash join of the distinct keys).
2. Within a group, equal amounts on equal days pair up by rank of id. This is what best-first matching does first, so
   taking these pairs by a join changes nothing; it also takes the worst case away: a million equal rows are one join.
3. What is left is sorted and cut wherever two neighbours differ by more than the tolerance, then by more than the
   window: no pair crosses a cut. A component of one left and one right row is decided by a comparison.
4. Only the other components, and the groups that may hold one-to-many matches, reach Python, smallest first, under the
   step limits of ``decisions``.

Time is therefore bounded by ``STEPS_PER_JOB_MAX`` steps of about 1 us on top of the joins, and memory by the rows.
Small sets go through the same stages in ``small_pairing``, without tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from settler_streams.core.matching import Row, Rules
from settler_streams.reconciliation.decisions import Component, Decisions
from settler_streams.reconciliation.sources import key_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from settler_streams.reconciliation.records import RecordSet

_PAIRS = pl.Schema({"l": pl.UInt32, "r": pl.UInt32})


@dataclass(slots=True)
class Pairing:
    """The matches as row numbers (``n``) of both sides, and the rows left undecided.

    Attributes:
        left, right: the rows of each side with ``gid``, the number of their group; null where no row of the other
            side has the same keys and currency.
        singles, groups, crossed: ``l``, ``r`` per matched pair; in ``groups`` a left row repeats, once per right row.
    """

    left: pl.DataFrame
    right: pl.DataFrame
    decisions: Decisions
    singles: pl.DataFrame = field(default_factory=_PAIRS.to_frame)
    groups: pl.DataFrame = field(default_factory=_PAIRS.to_frame)
    crossed: pl.DataFrame = field(default_factory=_PAIRS.to_frame)

    def used(self, side: str) -> pl.Series:
        """The row numbers of ``side`` (``l`` or ``r``) that are matched."""
        return pl.concat([self.singles[side], self.groups[side].unique(), self.crossed[side]])

    def open_rows(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows of each side that are not matched."""
        return _without(self.left, self.used("l")), _without(self.right, self.used("r"))


def find_matches(left: RecordSet, right: RecordSet, rules: Rules, checkpoint: Callable[[], None]) -> Pairing:
    """Match two parsed sets.

    Args:
        checkpoint: called between stages and between components; it may raise to abandon the work.

    Guarantee: the result depends only on the rows and the rules, not on the order of rows or of threads. Each row is
    used at most once.
    """
    grouped = _group(left.rows, right.rows, [*key_columns(rules.keys), "currency"])
    pairing = Pairing(*grouped, Decisions(rules, checkpoint))
    checkpoint()
    pairing.singles = _same_day_pairs(pairing.left, pairing.right)
    checkpoint()
    _near_pairs(pairing, rules)
    if rules.mode == "one_to_many":
        checkpoint()
        _settle_groups(pairing, rules)
    if not rules.currency_must_match:
        checkpoint()
        pairing.crossed = _crossed_pairs(*pairing.open_rows(), rules)
    return pairing


def _group(left: pl.DataFrame, right: pl.DataFrame, on: list[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    # Null equals nothing in a join, so a row with an empty key is in no group.
    groups = left.select(on).unique().join(right.select(on).unique(), on=on).with_row_index("gid")
    return (
        left.join(groups, on=on, how="left", maintain_order="left"),
        right.join(groups, on=on, how="left", maintain_order="left"),
    )


def _same_day_pairs(left: pl.DataFrame, right: pl.DataFrame) -> pl.DataFrame:
    """Pairs with no difference at all: the k-th left row by id with the k-th right row of the same cell."""
    cell = ["gid", "amount", "day"]
    ranked = [
        side.filter(pl.col("gid").is_not_null()).select("n", *cell, rank=pl.int_range(pl.len()).over(cell))
        for side in (left, right)
    ]
    return ranked[0].join(ranked[1], on=[*cell, "rank"]).select(l="n", r="n_right")


def _near_pairs(pairing: Pairing, rules: Rules) -> None:
    """Pairs with a difference in amount or date, best first."""
    rows = _cut(_comparable(pairing), ["gid"], "amount", rules.amount_tolerance_minor)
    rows = _cut(rows, ["component"], "day", rules.date_window_days)
    lone = pl.len().over("component") == 2
    couples = rows.filter(lone & ~pl.col("is_right")).join(rows.filter(lone & pl.col("is_right")), on="component")
    # The last cut was by day, so two rows alone are within the window; the cut by amount may have had others between.
    close = couples.filter((pl.col("amount") - pl.col("amount_right")).abs() <= rules.amount_tolerance_minor).select(
        l="n", r="n_right"
    )
    found = pairing.decisions.pairs(_components(rows.filter(~lone)))
    pairing.singles = pl.concat([pairing.singles, close, pl.DataFrame(found, schema=_PAIRS, orient="row")])


def _settle_groups(pairing: Pairing, rules: Rules) -> None:
    """Left rows that settle several right rows."""
    rows = _cut(_comparable(pairing), ["gid"], "day", rules.date_window_days)
    found = pairing.decisions.groups(_components(rows))
    pairing.groups = pl.DataFrame(found, schema=_PAIRS, orient="row")


def _crossed_pairs(left: pl.DataFrame, right: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """The only two open rows with the same keys, when their currencies differ."""
    keys = key_columns(rules.keys)
    alone = [side.filter(pl.len().over(keys) == 1).select("n", "day", "currency", *keys) for side in (left, right)]
    return (
        alone[0]
        .join(alone[1], on=keys)
        .filter(
            pl.col("currency") != pl.col("currency_right"),
            (pl.col("day") - pl.col("day_right")).abs() <= rules.date_window_days,
        )
        .select(l="n", r="n_right")
    )


def _comparable(pairing: Pairing) -> pl.DataFrame:
    """The open rows of both sides that have a group: ``gid``, ``is_right``, ``n``, ``amount``, ``day``."""
    return pl.concat(
        rows.filter(pl.col("gid").is_not_null()).select("gid", pl.lit(is_right).alias("is_right"), "n", "amount", "day")
        for is_right, rows in zip((False, True), pairing.open_rows(), strict=True)
    )


def _cut(rows: pl.DataFrame, by: list[str], on: str, gap_max: int) -> pl.DataFrame:
    """Number the runs of rows whose neighbours in ``on`` are at most ``gap_max`` apart; keep those with both sides."""
    rows = rows.sort(*by, on)
    starts = pl.any_horizontal(pl.col(name) != pl.col(name).shift() for name in by) | (pl.col(on).diff() > gap_max)
    rows = rows.with_columns(component=starts.fill_null(value=True).cum_sum())
    return rows.filter(
        pl.col("is_right").any().over("component"),
        ~pl.col("is_right").all().over("component"),
    )


def _components(rows: pl.DataFrame) -> Iterator[Component]:
    """Each component's left and right rows, the smallest component first."""
    order = rows.select(
        "is_right",
        "n",
        "amount",
        "day",
        "component",
        size=pl.len().over("component"),
        first=pl.col("n").filter(~pl.col("is_right")).min().over("component"),
    ).sort("size", "first", "component", "is_right", "n")
    sides, numbers, amounts, days, components = (order[name].to_list() for name in order.columns[:5])
    start = 0
    for end in range(1, len(sides) + 1):
        if end < len(sides) and components[end] == components[start]:
            continue
        rows_of = list(map(Row, numbers[start:end], amounts[start:end], days[start:end]))
        turn = sides.index(True, start, end) - start
        yield rows_of[:turn], rows_of[turn:]
        start = end


def _without(rows: pl.DataFrame, used: pl.Series) -> pl.DataFrame:
    return rows.join(used.to_frame("n"), on="n", how="anti", maintain_order="left")
