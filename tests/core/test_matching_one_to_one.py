"""One-to-one matching decides as a brute-force greedy does, and stays within its step limit."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.matching import Assignment, Row, assign

if TYPE_CHECKING:
    import random

UNLIMITED = 10**9

amounts = st.integers(-6, 6)
dates = st.integers(0, 5)


@st.composite
def sides(draw: st.DrawFn) -> list[Row]:
    points = draw(st.lists(st.tuples(amounts, dates), max_size=9))
    numbers = draw(st.permutations(range(len(points))))
    return [Row(number, amount, day) for number, (amount, day) in zip(numbers, points, strict=True)]


def brute_force(left: list[Row], right: list[Row], tolerance: int, window: int) -> list[tuple[int, int]]:
    """List every pair, sort by cost, take what is free."""
    costs = sorted(
        (abs(a.amount_minor - b.amount_minor), abs(a.day - b.day), a.number, b.number) for a, b in product(left, right)
    )
    pairs: list[tuple[int, int]] = []
    for difference, days, a, b in costs:
        free = all(a != taken_a and b != taken_b for taken_a, taken_b in pairs)
        if difference <= tolerance and days <= window and free:
            pairs.append((a, b))
    return pairs


def run(left: list[Row], right: list[Row], tolerance: int, window: int, steps_max: int = UNLIMITED) -> Assignment:
    return assign(left, right, amount_tolerance_minor=tolerance, date_window_days=window, steps_max=steps_max)


@settings(max_examples=1_000, deadline=None)
@given(sides(), sides(), st.integers(0, 6), st.integers(0, 5))
def test_pairs_are_those_of_the_brute_force_in_its_order(
    left: list[Row], right: list[Row], tolerance: int, window: int
) -> None:
    result = run(left, right, tolerance, window)
    assert result.pairs == brute_force(left, right, tolerance, window)
    assert result.undecided_left == result.undecided_right == []


@given(sides(), sides(), st.integers(0, 6), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_input_changes_nothing(
    left: list[Row], right: list[Row], tolerance: int, window: int, chance: random.Random
) -> None:
    shuffled = chance.sample(left, len(left)), chance.sample(right, len(right))
    assert run(left, right, tolerance, window) == run(*shuffled, tolerance, window)


@given(sides(), sides(), st.integers(0, 6), st.integers(0, 5), st.integers(0, 40))
def test_a_step_limit_leaves_rows_undecided_but_never_matches_wrongly(
    left: list[Row], right: list[Row], tolerance: int, window: int, steps_max: int
) -> None:
    result = run(left, right, tolerance, window, steps_max)
    by_left, by_right = {row.number: row for row in left}, {row.number: row for row in right}
    assert len({a for a, _ in result.pairs}) == len({b for _, b in result.pairs}) == len(result.pairs)
    for a, b in result.pairs:
        assert abs(by_left[a].amount_minor - by_right[b].amount_minor) <= tolerance
        assert abs(by_left[a].day - by_right[b].day) <= window
    matched_left, matched_right = {a for a, _ in result.pairs}, {b for _, b in result.pairs}
    assert matched_left.isdisjoint(result.undecided_left)
    assert matched_right.isdisjoint(result.undecided_right)
    # Between rows that are neither matched nor undecided no fitting pair is left.
    settled_left = [row for row in left if row.number not in matched_left.union(result.undecided_left)]
    open_right = [row for row in right if row.number not in matched_right]
    assert brute_force(settled_left, open_right, tolerance, window) == []


def test_the_exact_amount_wins_over_the_nearer_date() -> None:
    assert run([Row(0, 100, 0)], [Row(0, 101, 0), Row(1, 100, 3)], 5, 5).pairs == [(0, 1)]


def test_equal_rows_cost_one_look_up_each() -> None:
    rows = 20_000
    left, right = [Row(n, 100, 0) for n in range(rows)], [Row(n, 105, 1) for n in range(rows)]
    result = run(left, right, 10, 3, steps_max=3 * rows)
    assert result.pairs == [(n, n) for n in range(rows)]
    assert result.steps <= 2 * (rows + 1)


def test_rows_that_all_want_the_same_partner_stay_near_linear() -> None:
    rows = 5_000
    left = [Row(n, n, 0) for n in range(rows)]
    right = [Row(n, rows + n, 0) for n in range(rows)]
    result = run(left, right, 10 * rows, 0)
    assert len(result.pairs) == rows
    assert result.steps < 100 * rows  # all pairs would be 5,000 steps per row


def test_no_steps_leave_everything_undecided() -> None:
    result = run([Row(0, 1, 1)], [Row(0, 1, 1)], 0, 0, steps_max=0)
    assert (result.pairs, result.undecided_left, result.undecided_right) == ([], [0], [0])
