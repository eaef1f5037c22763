"""One-to-one matching of a group: repeatedly take the best pair that is left.

The best pair is the least by (amount difference, days apart, left number, right number). Taking it, again and again,
until no pair is within the limits gives a maximal matching that is the same for every order of the input.

All pairs are never listed. Equal rows share a cell (one amount on one day). Each left cell keeps its best right cell
in a heap; the right cells of one day are sorted by amount, so the nearest live one is a binary search and a jump over
exhausted cells. A heap entry whose right row has been taken is looked up again when it surfaces: its true cost can
only have grown, so the heap's order stays a lower bound and the greedy order is exact.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from settler_streams.core.matching.rules import Row


@dataclass(frozen=True, slots=True)
class Assignment:
    """Pairs of (left number, right number), and the rows that the step limit left undecided."""

    pairs: list[tuple[int, int]]
    undecided_left: list[int]
    undecided_right: list[int]
    steps: int


def assign(
    left: Sequence[Row],
    right: Sequence[Row],
    *,
    amount_tolerance_minor: int,
    date_window_days: int,
    steps_max: int,
) -> Assignment:
    """Match the rows of one group one to one.

    Guarantee: each row is used at most once; every pair is within both limits; unless ``steps_max`` cut the search
    short, no two unmatched rows are within both limits. A step is one look-up in one day, O(log rows).
    """
    days = {day: _Day(rows) for day, rows in _by_day(right).items()}
    search = _Search(days, amount_tolerance_minor, date_window_days)
    cells = _cells(left)
    heap: list[tuple[int, int, int, int, int]] = []
    pairs: list[tuple[int, int]] = []
    # Initial look-ups run in the order of the cells; what the limit leaves out is undecided.
    waiting = list(range(len(cells)))
    waiting.reverse()
    while (waiting or heap) and search.steps < steps_max:
        if waiting:
            search.push(heap, cells, waiting.pop())
            continue
        _, _, left_number, right_number, cell = heapq.heappop(heap)
        if search.take(right_number):
            pairs.append((left_number, right_number))
            cells[cell].numbers.pop()
        if cells[cell].numbers:
            search.push(heap, cells, cell)
    open_cells = [*waiting, *(entry[4] for entry in heap)]
    undecided_left = sorted(number for cell in open_cells for number in cells[cell].numbers)
    undecided_right = sorted(number for day in days.values() for number in day.live()) if undecided_left else []
    return Assignment(pairs, undecided_left, undecided_right, search.steps)


@dataclass(slots=True)
class _Cell:
    """The left rows of one amount on one day; ``numbers`` descend, so that ``pop`` takes the smallest."""

    amount_minor: int
    day: int
    numbers: list[int]


class _Day:
    """The right rows of one day: amounts ascend, each with its row numbers descending."""

    def __init__(self, rows: Iterable[Row]) -> None:
        numbers: defaultdict[int, list[int]] = defaultdict(list)
        for row in rows:
            numbers[row.amount_minor].append(row.number)
        self.amounts = sorted(numbers)
        self.numbers = [sorted(numbers[amount], reverse=True) for amount in self.amounts]
        # Links over exhausted cells: ``_after[i]`` leads to a live cell at or after i, ``_before[i + 1]`` at or before.
        self._after = list(range(len(self.amounts) + 1))
        self._before = list(range(len(self.amounts) + 1))

    def nearest(self, amount: int) -> list[int]:
        """The live cells next to ``amount``: the first at or above it, the first below."""
        at = bisect_left(self.amounts, amount)
        above, below = _root(self._after, at), _root(self._before, at) - 1
        return [cell for cell in (above, below) if 0 <= cell < len(self.amounts)]

    def take(self, cell: int) -> None:
        self.numbers[cell].pop()
        if not self.numbers[cell]:
            self._after[cell] = cell + 1
            self._before[cell + 1] = cell

    def live(self) -> Iterable[int]:
        return (number for numbers in self.numbers for number in numbers)


class _Search:
    """Looks up the best live right row of a left cell, and counts the steps."""

    def __init__(self, days: dict[int, _Day], amount_tolerance_minor: int, date_window_days: int) -> None:
        self.steps = 0
        self._days = days
        self._order = sorted(days)
        self._tolerance = amount_tolerance_minor
        self._window = date_window_days
        self._place = {
            number: (day, cell)
            for day, rows in days.items()
            for cell, numbers in enumerate(rows.numbers)
            for number in numbers
        }

    def push(self, heap: list[tuple[int, int, int, int, int]], cells: list[_Cell], cell: int) -> None:
        """Enter a left cell with its best right row; a cell without one is done for good."""
        left = cells[cell]
        first = bisect_left(self._order, left.day - self._window)
        last = bisect_right(self._order, left.day + self._window)
        best: tuple[int, int, int] | None = None
        for day in self._order[first:last]:
            rows = self._days[day]
            for place in rows.nearest(left.amount_minor):
                cost = (abs(rows.amounts[place] - left.amount_minor), abs(day - left.day), rows.numbers[place][-1])
                if cost[0] <= self._tolerance and (best is None or cost < best):
                    best = cost
        self.steps += 1 + last - first
        if best is not None:
            heapq.heappush(heap, (best[0], best[1], left.numbers[-1], best[2], cell))

    def take(self, number: int) -> bool:
        """Use a right row up; False when it is gone already."""
        day, cell = self._place[number]
        numbers = self._days[day].numbers[cell]
        if not numbers or numbers[-1] != number:
            return False
        self._days[day].take(cell)
        return True


def _root(links: list[int], at: int) -> int:
    """Follow the links to a live cell, halving the path on the way."""
    while links[at] != at:
        links[at] = links[links[at]]
        at = links[at]
    return at


def _by_day(rows: Sequence[Row]) -> dict[int, list[Row]]:
    days: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        days[row.day].append(row)
    return days


def _cells(rows: Sequence[Row]) -> list[_Cell]:
    cells: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for row in rows:
        cells[row.amount_minor, row.day].append(row.number)
    return [_Cell(amount, day, sorted(numbers, reverse=True)) for (amount, day), numbers in sorted(cells.items())]
