"""One-to-many matching finds what trying every subset finds, or says that it did not look."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.matching import Row, Settlement, settle
from settler_streams.core.matching.one_to_many import HALF_SUBSETS_MAX

UNLIMITED = 10**9

points = st.tuples(st.integers(-3, 12), st.integers(0, 4))


@st.composite
def sides(draw: st.DrawFn, size_max: int) -> list[Row]:
    drawn = draw(st.lists(points, max_size=size_max))
    numbers = draw(st.permutations(range(len(drawn))))
    return [Row(number, amount, day) for number, (amount, day) in zip(numbers, drawn, strict=True)]


def best_subset(payment: Row, right: list[Row], tolerance: int, window: int, size_max: int) -> tuple[int, ...] | None:
    near = sorted(row for row in right if abs(row.day - payment.day) <= window)
    fitting = [
        (abs(payment.amount_minor - sum(row.amount_minor for row in subset)), size, tuple(row.number for row in subset))
        for size in range(2, size_max + 1)
        for subset in combinations(near, size)
    ]
    best = min(fitting, default=None)
    return best[2] if best is not None and best[0] <= tolerance else None


def brute_force(
    left: list[Row], right: list[Row], tolerance: int, window: int, size_max: int
) -> list[tuple[int, tuple[int, ...]]]:
    found = []
    for payment in sorted(left, key=lambda row: (row.day, row.number)):
        subset = best_subset(payment, right, tolerance, window, size_max)
        if subset is not None:
            found.append((payment.number, subset))
            right = [row for row in right if row.number not in subset]
    return found


def run(
    left: list[Row], right: list[Row], tolerance: int = 0, window: int = 0, size_max: int = 8, steps: int = UNLIMITED
) -> Settlement:
    return settle(
        left,
        right,
        amount_tolerance_minor=tolerance,
        date_window_days=window,
        group_size_max=size_max,
        steps_max=steps,
    )


@settings(max_examples=500, deadline=None)
@given(sides(4), sides(8), st.integers(0, 3), st.integers(0, 4), st.integers(2, 5))
def test_groups_are_those_of_the_brute_force(
    left: list[Row], right: list[Row], tolerance: int, window: int, size_max: int
) -> None:
    result = run(left, right, tolerance, window, size_max)
    assert result.groups == brute_force(left, right, tolerance, window, size_max)
    assert result.undecided_left == result.undecided_right == []


@given(sides(4), sides(8), st.integers(0, 60))
def test_a_step_limit_matches_nothing_wrongly(left: list[Row], right: list[Row], steps: int) -> None:
    result = run(left, right, tolerance=1, window=2, size_max=4, steps=steps)
    amounts = {row.number: row.amount_minor for row in right}
    paid = {row.number: row.amount_minor for row in left}
    used = [number for _, parts in result.groups for number in parts]
    assert len(used) == len(set(used))
    assert all(abs(paid[number] - sum(amounts[part] for part in parts)) <= 1 for number, parts in result.groups)
    assert set(result.undecided_left).isdisjoint(number for number, _ in result.groups)
    assert set(result.undecided_right).isdisjoint(used)


def test_an_exact_pair_is_found_among_more_candidates_than_a_full_search_allows() -> None:
    right = [Row(n, 1_000 + 7 * n, 0) for n in range(100)]
    result = run([Row(0, right[10].amount_minor + right[90].amount_minor, 0)], right)
    assert [number for number, _ in result.groups] == [0]
    assert len(result.groups[0][1]) == 2


def test_too_many_subsets_are_reported_and_not_guessed() -> None:
    right = [Row(n, 2 * n + 2, 0) for n in range(60)]
    result = run([Row(0, 333, 0)], right)  # an odd payment of even invoices: only a full search could exclude it
    assert result.groups == []
    assert result.undecided_left == [0]
    assert len(result.undecided_right) == 60


def test_the_search_for_one_payment_is_bounded() -> None:
    right = [Row(n, 2 * (3**n), 0) for n in range(24)]
    result = run([Row(0, sum(row.amount_minor for row in right[:8]) + 1, 0)], right)
    assert result.groups == result.undecided_left == []
    assert result.steps < 10 * HALF_SUBSETS_MAX


def test_a_credit_note_reduces_the_sum() -> None:
    assert run([Row(0, 70, 0)], [Row(0, 100, 0), Row(1, -30, 0)]).groups == [(0, (0, 1))]


def test_the_smaller_group_wins_among_equal_sums() -> None:
    right = [Row(0, 10, 0), Row(1, 20, 0), Row(2, 30, 0), Row(3, 40, 0), Row(4, 50, 0)]
    assert run([Row(0, 60, 0)], right).groups == [(0, (0, 4))]
