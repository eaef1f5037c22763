"""A whole reconciliation, with tables and without, equals a slow one that compares every row with every other."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from itertools import combinations, product
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.matching import Rules
from settler_streams.reconciliation.result import Reconciliation
from tests.reconciliation.both_paths import reconcile_both

FIRST = dt.date(2026, 1, 1)


class Line(NamedTuple):
    id: str
    minor: int
    day: int
    currency: str
    reference: str | None
    party: str | None


@st.composite
def lines(draw: st.DrawFn, prefix: str, size_max: int) -> list[Line]:
    count = draw(st.integers(0, size_max))
    order = draw(st.permutations(range(count)))
    return [
        Line(
            f"{prefix}{order[n]}",
            draw(st.integers(-4, 9)),
            draw(st.integers(0, 4)),
            draw(st.sampled_from(["EUR", "EUR", "JPY"])),
            draw(st.sampled_from(["x", "x", "y", "", None])),
            draw(st.sampled_from(["p", "p", "q"])),
        )
        for n in range(count)
    ]


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    keys = draw(st.sampled_from([(), ("reference",), ("reference", "party")]))
    return Rules(
        keys=keys,
        amount_tolerance_minor=draw(st.integers(0, 3)),
        date_window_days=draw(st.integers(0, 3)),
        currency_must_match=draw(st.booleans()) if keys else True,
        mode=draw(st.sampled_from(["one_to_one", "one_to_many"])),
        group_size_max=draw(st.integers(2, 4)),
    )


class Oracle:
    """Best-first pairs, then groups by payment date, then lone rows across currencies; all by trying everything."""

    def __init__(self, left: list[Line], right: list[Line], rules: Rules) -> None:
        self.rules = rules
        self.left, self.right = left, right
        self.matches: set[tuple[str, str, tuple[str, ...]]] = set()
        self.free_left = sorted(left)
        self.free_right = sorted(right)
        self._one_to_one()
        if rules.mode == "one_to_many":
            self._one_to_many()
        if not rules.currency_must_match:
            self._cross_currency()

    def keyed(self, a: Line, b: Line) -> bool:
        return all(getattr(a, key) and getattr(a, key) == getattr(b, key) for key in self.rules.keys)

    def grouped(self, a: Line, b: Line) -> bool:
        return self.keyed(a, b) and a.currency == b.currency

    def priced(self, a: Line, b: Line) -> bool:
        return self.grouped(a, b) and abs(a.minor - b.minor) <= self.rules.amount_tolerance_minor

    def dated(self, a: Line, b: Line) -> bool:
        return abs(a.day - b.day) <= self.rules.date_window_days

    def take(self, kind: str, a: Line, parts: tuple[Line, ...]) -> None:
        self.matches.add((kind, a.id, tuple(part.id for part in parts)))
        self.free_left.remove(a)
        for part in parts:
            self.free_right.remove(part)

    def _one_to_one(self) -> None:
        cost = lambda pair: (abs(pair[0].minor - pair[1].minor), abs(pair[0].day - pair[1].day), pair[0].id, pair[1].id)  # noqa: E731
        for a, b in sorted(product(self.left, self.right), key=cost):
            if a in self.free_left and b in self.free_right and self.priced(a, b) and self.dated(a, b):
                self.take("one_to_one", a, (b,))

    def _one_to_many(self) -> None:
        for a in sorted(self.free_left, key=lambda line: (line.day, line.id)):
            near = [b for b in self.free_right if self.grouped(a, b) and self.dated(a, b)]
            options = [
                (abs(a.minor - sum(b.minor for b in parts)), size, parts)
                for size in range(2, self.rules.group_size_max + 1)
                for parts in combinations(near, size)
            ]
            best = min(options, default=None)
            if best is not None and best[0] <= self.rules.amount_tolerance_minor:
                self.take("one_to_many", a, best[2])

    def _cross_currency(self) -> None:
        free_left, free_right = list(self.free_left), list(self.free_right)
        for a, b in product(free_left, free_right):
            alone = not any(self.keyed(a, other) for other in free_left if other != a)
            alone &= not any(self.keyed(a, other) for other in free_right if other != b)
            if alone and self.keyed(a, b) and a.currency != b.currency and self.dated(a, b):
                self.take("cross_currency", a, (b,))

    def reason(self, a: Line, others: list[Line]) -> str:
        if not any(self.keyed(a, b) for b in others):
            return "no_key_match"
        if not any(self.grouped(a, b) for b in others):
            return "currency_mismatch"
        if not any(self.priced(a, b) for b in others):
            return "amount_out_of_tolerance"
        if not any(self.priced(a, b) and self.dated(a, b) for b in others):
            return "outside_date_window"
        return "already_matched"


def as_row(line: Line) -> dict[str, Any]:
    return {
        "id": line.id,
        "amount_minor": line.minor,
        "currency": line.currency,
        "date": (FIRST + dt.timedelta(days=line.day)).isoformat(),
        "reference": line.reference,
        "party": line.party,
    }


def run(left: list[Line], right: list[Line], rules: Rules) -> Reconciliation:
    return reconcile_both([as_row(line) for line in left], [as_row(line) for line in right], rules)


@settings(max_examples=400, deadline=None)
@given(lines("l", 7), lines("r", 8), rules())
def test_matches_reasons_and_totals_are_those_of_the_oracle(left: list[Line], right: list[Line], rules: Rules) -> None:
    result = run(left, right, rules)
    oracle = Oracle(left, right, rules)

    found = result.matches.select("kind", "left_id", "right_ids").iter_rows()
    assert {(kind, left_id, tuple(right_ids)) for kind, left_id, right_ids in found} == oracle.matches

    expected = {("left", a.id, oracle.reason(a, right)) for a in oracle.free_left}
    expected |= {("right", b.id, oracle.reason(b, left)) for b in oracle.free_right}
    assert set(result.unmatched.select("side", "row_id", "reason").iter_rows()) == expected

    for side, lines_of, free in (
        (result.report.left, left, oracle.free_left),
        (result.report.right, right, oracle.free_right),
    ):
        totals, open_totals = Counter[str](), Counter[str]()
        for line in lines_of:
            totals[line.currency] += line.minor
        for line in free:
            open_totals[line.currency] += line.minor
        for entry in side.currencies:
            assert entry.total_minor == totals[entry.currency]
            assert entry.unmatched_minor == open_totals[entry.currency]
            assert entry.matched_minor == totals[entry.currency] - open_totals[entry.currency]


@settings(max_examples=100, deadline=None)
@given(lines("l", 7), lines("r", 8), rules())
def test_the_order_of_the_rows_changes_no_match(left: list[Line], right: list[Line], rules: Rules) -> None:
    columns = ["kind", "left_id", "right_ids", "difference_minor"]
    forward = run(left, right, rules).matches.select(columns).sort("left_id")
    backward = run(left[::-1], right[::-1], rules).matches.select(columns).sort("left_id")
    assert forward.equals(backward)
