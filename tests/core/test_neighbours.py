"""Noise is judged against the others, sums merge in any order, and entitlements are exact."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settler_streams.core.neighbours import (
    NoisePolicy,
    Windows,
    exceeds,
    max_min_entitlement,
    step,
)
from settler_streams.errors import InvalidRequestError

GRID = Windows()
POLICY = NoisePolicy()


def judge(windows, tenants=0, watches=None):
    """Judge a sequence of request counts per tenant; the verdicts per window."""
    watches, said = watches or {}, []
    for sums in windows:
        watches, verdicts = step(watches, {"requests": sums}, tenants, POLICY)
        said.append([(verdict.tenant, verdict.noisy) for verdict in verdicts])
    return said, watches


LOUD, CALM = {"a": 4_000, "b": 1_000, "c": 1_000}, {"a": 1_000, "b": 1_000, "c": 1_000}


def test_three_loud_windows_of_five_flag_and_five_quiet_ones_release():
    said, watches = judge([LOUD, CALM, LOUD, CALM, LOUD, *[CALM] * 5])
    assert said == [[], [], [], [], [("a", True)], [], [], [], [], [("a", False)]]
    assert judge([CALM] * 5, watches=watches)[1] == {}


def test_two_loud_windows_of_five_and_interrupted_quiet_change_nothing():
    said, _ = judge([LOUD, CALM, CALM, CALM, LOUD, CALM, CALM, CALM])
    assert said == [[]] * 8
    said, _ = judge([LOUD, LOUD, LOUD, *[CALM] * 4, LOUD, *[CALM] * 4])
    assert said == [[], [], [("a", True)], *[[]] * 9]


def test_a_tenant_that_vanishes_is_released():
    said, watches = judge([LOUD, LOUD, LOUD, *[{}] * 5])
    assert said[-1] == [("a", False)]
    assert watches == {}


def test_the_rule_fires_among_two_and_three_tenants_where_the_plain_average_cannot():
    for sums in ({"a": 4_000, "b": 1_000}, LOUD):
        assert sums["a"] <= 3 * sum(sums.values()) / len(sums)
        assert judge([sums] * 3)[0][2] == [("a", True)]


def test_a_trickle_against_nothing_and_a_lone_tenant_are_no_noise():
    assert judge([{"a": 3, "b": 0}] * 5)[0] == [[]] * 5
    assert judge([{"a": 10_000}] * 5)[0] == [[]] * 5
    assert judge([{"a": 10_000}] * 3, tenants=2)[0][2] == [("a", True)]


def test_a_verdict_names_usage_average_and_ratio():
    watches = {}
    for _ in range(3):
        watches, verdicts = step(watches, {"requests": LOUD}, 0, POLICY)
    assert verdicts == [("a", "requests", True, 4_000, 1_000, 4_000)]


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=8), st.integers(1, 5))
def test_exceeding_is_the_exact_fraction(amounts, factor):
    policy, total = NoisePolicy(factor=factor), sum(amounts)
    for place, amount in enumerate(amounts):
        others = amounts[:place] + amounts[place + 1 :]
        expected = amount > factor * Fraction(sum(others), len(others))
        assert exceeds(amount, total, len(amounts), 0, policy) == expected


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), max_size=6),
    st.integers(0, 40),
)
def test_entitlements_equal_the_water_level_found_unit_by_unit(tenants, capacity):
    """The oracle pours one indivisible drop after another, always to whom it leaves with the least per weight."""
    demands = {f"t{n}": demand for n, (demand, _) in enumerate(tenants)}
    weights = {f"t{n}": weight for n, (_, weight) in enumerate(tenants)}
    shares = max_min_entitlement(demands, weights, capacity)
    assert sum(shares.values()) == min(capacity, sum(demands.values()))
    assert all(0 <= shares[tenant] <= demands[tenant] for tenant in demands)
    level = water_level(demands, weights, capacity)
    for tenant, demand in demands.items():
        exact = min(Fraction(demand), level * weights[tenant])
        assert abs(shares[tenant] - exact) < 1
        if exact == demand:
            assert shares[tenant] == demand


def water_level(demands, weights, capacity):
    """The exact level, tried at every point where a tenant is satisfied, by exhaustion."""
    if sum(demands.values()) <= capacity:
        return Fraction(max([*demands.values(), 0]))
    for satisfied in range(1 << len(demands)):
        full = [tenant for n, tenant in enumerate(demands) if satisfied >> n & 1]
        short = [tenant for tenant in demands if tenant not in full]
        if not short:
            continue
        level = Fraction(capacity - sum(demands[t] for t in full), sum(weights[t] for t in short))
        if all(demands[t] <= level * weights[t] for t in full) and all(demands[t] > level * weights[t] for t in short):
            return level
    raise AssertionError("a water level exists for any demand above the capacity")


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidRequestError):
        Windows(10, 2, 10)
    with pytest.raises(InvalidRequestError):
        NoisePolicy(tenants_min=1)
    for demands, weights, capacity in (({"a": -1}, {"a": 1}, 1), ({"a": 1}, {"a": 0}, 1), ({"a": 1}, {"a": 1}, -1)):
        with pytest.raises(InvalidRequestError):
            max_min_entitlement(demands, weights, capacity)
