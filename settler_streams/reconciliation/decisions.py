"""Decide components of rows, one after the other, within a step limit for each and one for the whole job.

A component is the left and the right rows that could match each other. They come smallest first, so a huge one cannot
starve the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from settler_streams.core.matching import Row, Rules, assign, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STEPS_PER_ROW_MAX = 64
"""Look-ups per row of a component: enough for a window of a month in which every row has a neighbour on every day."""

STEPS_PER_COMPONENT_MIN = 50_000
"""A small component is not cut short by its size: the search for one payment takes at most about 40,000 steps."""

STEPS_PER_JOB_MAX = 10_000_000
"""About ten seconds of Python on a free core."""

Component = tuple[list[Row], list[Row]]


@dataclass(slots=True)
class Decisions:
    """What has been decided, and the rows that a step limit left undecided, by number.

    Args:
        checkpoint: called before each component; it may raise to abandon the work.
    """

    rules: Rules
    checkpoint: Callable[[], None]
    undecided_left: list[int] = field(default_factory=list)
    undecided_right: list[int] = field(default_factory=list)
    steps: int = 0

    def pairs(self, components: Iterable[Component]) -> list[tuple[int, int]]:
        """Pairs of a left and a right row."""
        found: list[tuple[int, int]] = []
        for lefts, rights in components:
            self.checkpoint()
            result = assign(
                lefts,
                rights,
                amount_tolerance_minor=self.rules.amount_tolerance_minor,
                date_window_days=self.rules.date_window_days,
                steps_max=self._steps_max(len(lefts) + len(rights)),
            )
            found += result.pairs
            self._add(result.undecided_left, result.undecided_right, result.steps)
        return found

    def groups(self, components: Iterable[Component]) -> list[tuple[int, int]]:
        """Left rows that settle several right rows: a left row repeats, once per right row."""
        found: list[tuple[int, int]] = []
        for lefts, rights in components:
            if len(rights) < 2:
                continue
            self.checkpoint()
            result = settle(
                lefts,
                rights,
                amount_tolerance_minor=self.rules.amount_tolerance_minor,
                date_window_days=self.rules.date_window_days,
                group_size_max=self.rules.group_size_max,
                steps_max=self._steps_max(len(lefts) + len(rights)),
            )
            found += [(number, part) for number, parts in result.groups for part in parts]
            self._add(result.undecided_left, result.undecided_right, result.steps)
        return found

    def _steps_max(self, rows: int) -> int:
        """What one component may still spend."""
        return min(STEPS_PER_JOB_MAX - self.steps, max(STEPS_PER_COMPONENT_MIN, STEPS_PER_ROW_MAX * rows))

    def _add(self, undecided_left: list[int], undecided_right: list[int], steps: int) -> None:
        self.undecided_left += undecided_left
        self.undecided_right += undecided_right
        self.steps += steps
