"""One-to-many matching of a group: one payment settles several invoices.

Payments take their turn by date, the oldest first, then by number. Each takes the set of open invoices within its
date window that is least by (difference, size, invoice numbers), if its difference is within the tolerance.

The search meets in the middle: the candidates are split into two halves, the sums of each half's subsets are kept per
size, and for every subset of one half the nearest fitting sum of the other is a binary search. Sizes grow one by one,
so an exact pair is found before any triple is looked at. A payment whose halves would have more than
``HALF_SUBSETS_MAX`` subsets is undecided, since a sum found in part of the search may not be the best one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from math import comb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from settler_streams.core.matching.rules import Row

HALF_SUBSETS_MAX = 4096
"""Subsets per half: 24 candidates in groups of up to 8, 180 in pairs; about 10 ms of work for one payment."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """Matches of (left number, right numbers ascending), and the rows that a limit left undecided."""

    groups: list[tuple[int, tuple[int, ...]]]
    undecided_left: list[int]
    undecided_right: list[int]
    steps: int


def settle(
    left: Sequence[Row],
    right: Sequence[Row],
    *,
    amount_tolerance_minor: int,
    date_window_days: int,
    group_size_max: int,
    steps_max: int,
) -> Settlement:
    """Let each left row settle 2 to ``group_size_max`` right rows.

    Guarantee: each row is used at most once; every group is within the limits; no left row that is neither matched
    nor undecided has a fitting set among the right rows that stay unmatched. A step is one candidate, subset or
    look-up; the last payment may overrun ``steps_max`` by its own bounded search.
    """
    open_rows = sorted(right, key=lambda row: (row.day, row.number))
    days = [row.day for row in open_rows]
    groups: list[tuple[int, tuple[int, ...]]] = []
    undecided_left: list[int] = []
    undecided_right: set[int] = set()
    steps = 0
    exhausted = False
    for payment in sorted(left, key=lambda row: (row.day, row.number)):
        first = bisect_left(days, payment.day - date_window_days)
        last = bisect_right(days, payment.day + date_window_days)
        steps += 1
        if last - first < 2:
            continue
        if steps + last - first > steps_max:
            exhausted = True
            undecided_left.append(payment.number)
            continue
        steps += last - first
        candidates = _plausible(payment, open_rows[first:last], amount_tolerance_minor)
        search = _SubsetSum(payment.amount_minor, candidates, amount_tolerance_minor)
        chosen = search.best(group_size_max)
        steps += search.steps + search.subsets
        if search.cut_short:
            undecided_left.append(payment.number)
            undecided_right.update(row.number for row in candidates)
        elif chosen:
            groups.append((payment.number, chosen))
            taken = set(chosen)
            kept = [row for row in open_rows[first:last] if row.number not in taken]
            open_rows[first:last] = kept
            days[first:last] = [row.day for row in kept]
    undecided = sorted(row.number for row in open_rows if exhausted or row.number in undecided_right)
    return Settlement(groups, undecided_left, undecided, steps)


def _plausible(payment: Row, rows: Sequence[Row], tolerance: int) -> list[Row]:
    """The rows that could be part of the sum, by number. When all have one sign, none may exceed the payment."""
    if all(row.amount_minor >= 0 for row in rows):
        rows = [row for row in rows if row.amount_minor <= payment.amount_minor + tolerance]
    elif all(row.amount_minor <= 0 for row in rows):
        rows = [row for row in rows if row.amount_minor >= payment.amount_minor - tolerance]
    return sorted(rows)


@dataclass(slots=True)
class _SubsetSum:
    """The best subset of ``candidates`` (by number) for one target."""

    target: int
    candidates: list[Row]
    tolerance: int
    steps: int = 0
    cut_short: bool = False
    _halves: tuple[_Half, _Half] = field(init=False)

    def __post_init__(self) -> None:
        middle = (len(self.candidates) + 1) // 2
        self._halves = _Half(self.candidates[:middle]), _Half(self.candidates[middle:])

    @property
    def subsets(self) -> int:
        """How many subsets have been summed."""
        return self._halves[0].subsets + self._halves[1].subsets

    def best(self, size_max: int) -> tuple[int, ...] | None:
        amounts = sorted(row.amount_minor for row in self.candidates)
        least = [0, *accumulate(amounts)]
        most = [0, *accumulate(reversed(amounts))]
        found: tuple[int, int, tuple[int, ...]] | None = None
        for size in range(2, min(size_max, len(amounts)) + 1):
            # No set of this size can reach the target: skip it without a search.
            if least[size] > self.target + self.tolerance or most[size] < self.target - self.tolerance:
                continue
            if _subsets(len(self._halves[0].rows), size) > HALF_SUBSETS_MAX:
                self.cut_short = True
                return None
            of_size = self._best_of(size)
            if of_size is not None and (found is None or of_size < found):
                found = of_size
            if found is not None and found[0] == 0:
                break
        return found[2] if found is not None else None

    def _best_of(self, size: int) -> tuple[int, int, tuple[int, ...]] | None:
        """The least (difference, size, numbers) among the sets of exactly ``size`` rows, within the tolerance."""
        front, back = self._halves
        found: tuple[int, int, tuple[int, ...]] | None = None
        for front_size in range(size + 1):
            sums = front.sums(front_size)
            rest = back.sums(size - front_size)
            order = back.order(size - front_size)
            self.steps += len(sums)
            for total, numbers in sums.items():
                wanted = self.target - total
                at = bisect_left(order, wanted)
                for near in order[max(at - 1, 0) : at + 1]:
                    difference = abs(near - wanted)
                    if difference > self.tolerance or (found is not None and difference > found[0]):
                        continue
                    candidate = (difference, size, numbers + rest[near])
                    if found is None or candidate < found:
                        found = candidate
        return found


class _Half:
    """Subset sums of half of the candidates, one layer per size, made when first asked for."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.subsets = 0
        self._sums: dict[int, dict[int, tuple[int, ...]]] = {}
        self._order: dict[int, list[int]] = {}

    def sums(self, size: int) -> dict[int, tuple[int, ...]]:
        """Each sum of ``size`` rows with the first set of numbers that makes it."""
        if size not in self._sums:
            layer: dict[int, tuple[int, ...]] = {}
            for subset in combinations(self.rows, size):
                layer.setdefault(sum(row.amount_minor for row in subset), tuple(row.number for row in subset))
            self.subsets += comb(len(self.rows), size)
            self._sums[size] = layer
            self._order[size] = sorted(layer)
        return self._sums[size]

    def order(self, size: int) -> list[int]:
        self.sums(size)
        return self._order[size]


def _subsets(rows: int, size_max: int) -> int:
    """How many subsets of at most ``size_max`` rows a half has."""
    return sum(comb(rows, size) for size in range(size_max + 1))
