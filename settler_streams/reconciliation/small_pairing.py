"""Match two small record sets without tables, through the stages that ``pairing`` describes.

Groups share no row, so each passes through a stage of its own; only the decisions on components follow one order for
the whole job, since they share one step limit.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from settler_streams.core.matching import Row, Rules
from settler_streams.reconciliation.decisions import Component, Decisions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from settler_streams.reconciliation.small_records import Record

_AMOUNT, _DAY = Row._fields.index("amount_minor"), Row._fields.index("day")

GroupKey = tuple[str | None, ...]
"""A currency and the match keys."""

_Sided = tuple[bool, Row]
"""Whether a row is a right one, and the row."""


@dataclass(slots=True)
class SmallPairing:
    """The matches as row numbers of both sides, and the rows left undecided.

    Attributes:
        groups: the left and right rows that share keys and currency, where both sides have some.
        singles, several, crossed: matched pairs; in ``several`` a left row repeats, once per right row.
        used_left, used_right: the rows that are matched.
    """

    left: list[Record]
    right: list[Record]
    decisions: Decisions
    groups: dict[GroupKey, Component]
    singles: list[tuple[int, int]] = field(default_factory=list)
    several: list[tuple[int, int]] = field(default_factory=list)
    crossed: list[tuple[int, int]] = field(default_factory=list)
    used_left: set[int] = field(default_factory=set)
    used_right: set[int] = field(default_factory=set)

    def take(self, kind: list[tuple[int, int]], pairs: Iterable[tuple[int, int]]) -> None:
        """Match ``pairs``."""
        for left, right in pairs:
            kind.append((left, right))
            self.used_left.add(left)
            self.used_right.add(right)

    def open_groups(self) -> Iterator[list[_Sided]]:
        """The rows that are not matched, of each group that has some on both sides."""
        for lefts, rights in self.groups.values():
            free_left = [(False, row) for row in lefts if row.number not in self.used_left]
            free_right = [(True, row) for row in rights if row.number not in self.used_right]
            if free_left and free_right:
                yield free_left + free_right


def find_small_matches(
    left: list[Record], right: list[Record], rules: Rules, checkpoint: Callable[[], None]
) -> SmallPairing:
    """Match two parsed sets. The arguments and guarantees are those of :func:`pairing.find_matches`."""
    pairing = SmallPairing(left, right, Decisions(rules, checkpoint), _groups(left, right))
    checkpoint()
    for lefts, rights in pairing.groups.values():
        pairing.take(pairing.singles, _same_day_pairs(lefts, rights))
    checkpoint()
    _near_pairs(pairing, rules)
    if rules.mode == "one_to_many":
        checkpoint()
        runs = (run for rows in pairing.open_groups() for run in _cut(rows, _DAY, rules.date_window_days))
        pairing.take(pairing.several, pairing.decisions.groups(_components(runs)))
    if not rules.currency_must_match:
        checkpoint()
        pairing.take(pairing.crossed, _crossed_pairs(pairing, rules))
    return pairing


def _groups(left: Sequence[Record], right: Sequence[Record]) -> dict[GroupKey, Component]:
    groups: defaultdict[GroupKey, Component] = defaultdict(lambda: ([], []))
    for side, records in enumerate((left, right)):
        for number, record in enumerate(records):
            # A row with an empty key is in no group.
            if None not in record.keys:
                row = Row(number, record.amount_minor, record.day)
                groups[record.currency, *record.keys][side].append(row)
    return {key: sides for key, sides in groups.items() if all(sides)}


def _same_day_pairs(lefts: Sequence[Row], rights: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Pairs with no difference at all: the k-th left row by id with the k-th right row of the same cell."""
    cells: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
    for row in rights:
        cells[row.amount_minor, row.day].append(row.number)
    for row in lefts:
        if waiting := cells.get((row.amount_minor, row.day)):
            yield row.number, waiting.popleft()


def _near_pairs(pairing: SmallPairing, rules: Rules) -> None:
    """Pairs with a difference in amount or date, best first."""
    ambiguous: list[list[_Sided]] = []
    for rows in pairing.open_groups():
        for priced in _cut(rows, _AMOUNT, rules.amount_tolerance_minor):
            for run in _cut(priced, _DAY, rules.date_window_days):
                if len(run) > 2:
                    ambiguous.append(run)
                    continue
                # The cut was by day, so the two are within the window; the cut by amount may have had others between.
                ((_, one), (_, other)) = sorted(run)
                if abs(one.amount_minor - other.amount_minor) <= rules.amount_tolerance_minor:
                    pairing.take(pairing.singles, [(one.number, other.number)])
    pairing.take(pairing.singles, pairing.decisions.pairs(_components(ambiguous)))


def _crossed_pairs(pairing: SmallPairing, rules: Rules) -> Iterator[tuple[int, int]]:
    """The only two open rows with the same keys, when their currencies differ."""
    lone_left = _lone(pairing.left, pairing.used_left)
    lone_right = _lone(pairing.right, pairing.used_right)
    for keys, left_number in lone_left.items():
        right_number = lone_right.get(keys)
        if right_number is None:
            continue
        left, right = pairing.left[left_number], pairing.right[right_number]
        if left.currency != right.currency and abs(left.day - right.day) <= rules.date_window_days:
            yield left_number, right_number


def _lone(records: Sequence[Record], used: set[int]) -> dict[tuple[str | None, ...], int]:
    """The open row of each combination of keys that has just one."""
    numbers: defaultdict[tuple[str | None, ...], list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        if number not in used and None not in record.keys:
            numbers[record.keys].append(number)
    return {keys: alone[0] for keys, alone in numbers.items() if len(alone) == 1}


def _cut(rows: list[_Sided], on: int, gap_max: int) -> Iterator[list[_Sided]]:
    """The runs of rows whose neighbours in a field are at most ``gap_max`` apart, where both sides have some."""
    rows = sorted(rows, key=lambda sided: sided[1][on])
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end][1][on] - rows[end - 1][1][on] <= gap_max:
            continue
        run = rows[start:end]
        start = end
        if 0 < sum(is_right for is_right, _ in run) < len(run):
            yield run


def _components(runs: Iterable[list[_Sided]]) -> list[Component]:
    """The left and right rows of each run by number, the smallest run first."""
    components = []
    for run in runs:
        run.sort()
        turn = next(place for place, (is_right, _) in enumerate(run) if is_right)
        components.append(([row for _, row in run[:turn]], [row for _, row in run[turn:]]))
    return sorted(components, key=lambda sides: (len(sides[0]) + len(sides[1]), sides[0][0].number))
