"""The token bucket never admits more than its window, and says exactly when to come back."""

from __future__ import annotations

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from settler_streams.core.token_bucket import (
    UNITS_PER_TOKEN,
    Bucket,
    RatePolicy,
    change_policy,
    empty,
    full,
    is_full,
    take,
    take_all,
)
from settler_streams.errors import ConfigurationError, InvalidRequestError

START_MS = 1_000_000


@st.composite
def policies(draw: st.DrawFn, rate_min: int = 0) -> RatePolicy:
    rate = draw(st.one_of(st.integers(rate_min, 10), st.integers(rate_min, 100_000)))
    floor = draw(st.integers(0, rate))
    return RatePolicy(rate, draw(st.integers(1, 50)), floor, draw(st.integers(0, 1000)))


def rate_per_ms(policy: RatePolicy) -> Fraction:
    surplus = Fraction((policy.rate_per_minute - policy.floor_per_minute) * policy.surplus_per_mille, 1000)
    return (policy.floor_per_minute + surplus) / 60_000


requests = st.lists(
    st.tuples(st.one_of(st.integers(0, 50), st.integers(0, 100_000)), st.integers(1, 60)), min_size=1, max_size=40
)


@given(policies(), requests)
def test_no_window_admits_more_than_its_burst_plus_its_rate(policy, steps):
    bucket, now_ms = full(policy, START_MS), START_MS
    admitted: list[tuple[int, int]] = []
    for gap_ms, cost in steps:
        now_ms += gap_ms
        bucket, verdict = take(bucket, policy, cost, now_ms)
        if verdict.allowed:
            admitted.append((now_ms, cost))
    for first in range(len(admitted)):
        spent = 0
        for at_ms, cost in admitted[first:]:
            spent += cost
            assert spent <= policy.burst + rate_per_ms(policy) * (at_ms - admitted[first][0])


@given(policies(), requests)
def test_whatever_the_exact_level_can_pay_is_admitted(policy, steps):
    """The other side of the claim, against a bucket in exact fractions: nothing is refused that is affordable."""
    bucket, now_ms, level = full(policy, START_MS), START_MS, Fraction(policy.burst)
    for gap_ms, cost in steps:
        now_ms += gap_ms
        level = min(Fraction(policy.burst), level + rate_per_ms(policy) * gap_ms)
        bucket, verdict = take(bucket, policy, cost, now_ms)
        assert verdict.allowed == (cost <= level)
        level -= cost if verdict.allowed else 0
        assert verdict.remaining == level.__floor__()


@given(policies(), st.integers(1, 60), st.integers(0, 50 * UNITS_PER_TOKEN), st.integers(-5_000, 200_000))
def test_retry_after_is_exact_to_the_millisecond(policy, cost, level, gap_ms):
    bucket = Bucket(min(level, policy.burst * UNITS_PER_TOKEN), START_MS)
    now_ms = START_MS + gap_ms
    same, verdict = take(bucket, policy, cost, now_ms)
    if verdict.allowed:
        assert verdict.retry_after_ms == 0
        return
    assert same is bucket
    if verdict.retry_after_ms is None:
        assert cost > policy.burst or rate_per_ms(policy) == 0
        assert not take(bucket, policy, cost, now_ms + 10**15)[1].allowed
        return
    assert verdict.retry_after_ms > 0
    assert not take(bucket, policy, cost, now_ms + verdict.retry_after_ms - 1)[1].allowed
    assert take(bucket, policy, cost, now_ms + verdict.retry_after_ms)[1].allowed


@given(st.lists(policies(), min_size=1, max_size=4), requests)
def test_a_chain_is_charged_all_or_nothing(chain, steps):
    buckets, now_ms = tuple(full(policy, START_MS) for policy in chain), START_MS
    for gap_ms, cost in steps:
        now_ms += gap_ms
        single = [take(bucket, policy, cost, now_ms) for bucket, policy in zip(buckets, chain, strict=True)]
        after, verdict = take_all(buckets, chain, cost, now_ms)
        assert verdict.allowed == all(answer.allowed for _, answer in single)
        assert verdict.remaining == min(answer.remaining for _, answer in single)
        if verdict.allowed:
            assert verdict.denied_by == -1
            assert after == tuple(bucket for bucket, _ in single)
        else:
            assert after == buckets
            assert not single[verdict.denied_by][1].allowed
            if verdict.retry_after_ms is not None:
                assert not take_all(buckets, chain, cost, now_ms + verdict.retry_after_ms - 1)[1].allowed
                assert take_all(buckets, chain, cost, now_ms + verdict.retry_after_ms)[1].allowed
        buckets = after


@given(policies(rate_min=1), st.integers(1, 600_000))
def test_pressure_never_takes_the_floor(policy, elapsed_ms):
    """Under full pressure a minute still yields the floor; without pressure it yields the whole rate."""
    pressed = msgspec.structs.replace(policy, surplus_per_mille=0, burst=10**9)
    relaxed = msgspec.structs.replace(policy, surplus_per_mille=1000, burst=10**9)
    one = 1  # a take of one token settles the level
    start = Bucket(one * UNITS_PER_TOKEN, START_MS)
    low = take(start, pressed, one, START_MS + elapsed_ms)[0].level
    between = take(start, msgspec.structs.replace(policy, burst=10**9), one, START_MS + elapsed_ms)[0].level
    high = take(start, relaxed, one, START_MS + elapsed_ms)[0].level
    assert low == policy.floor_per_minute * elapsed_ms * 1000
    assert high == policy.rate_per_minute * elapsed_ms * 1000
    assert low <= between <= high


@given(st.lists(st.tuples(policies(), requests), min_size=2, max_size=5))
def test_policy_changes_forge_no_tokens(phases):
    """Across changes, a window admits at most the greatest burst plus the integral of the rate."""
    policy, now_ms = phases[0][0], START_MS
    bucket, earned = full(policy, START_MS), Fraction(0)
    admitted: list[tuple[Fraction, int]] = []
    for following, steps in phases:
        bucket, policy = change_policy(bucket, policy, following, now_ms), following
        for gap_ms, cost in steps:
            now_ms += gap_ms
            earned += rate_per_ms(policy) * gap_ms
            bucket, verdict = take(bucket, policy, cost, now_ms)
            if verdict.allowed:
                admitted.append((earned, cost))
    burst_max = max(policy.burst for policy, _ in phases)
    for first in range(len(admitted)):
        spent = 0
        for earned_then, cost in admitted[first:]:
            spent += cost
            assert spent <= burst_max + earned_then - admitted[first][0]


def test_a_rate_that_was_raised_pays_nothing_for_the_time_before():
    slow, fast = RatePolicy(60, 100), RatePolicy(60_000, 100)
    bucket = change_policy(empty(0), slow, fast, 10_000)
    assert bucket == Bucket(10 * UNITS_PER_TOKEN, 10_000)


@given(policies(), st.lists(st.integers(-100_000, 0), min_size=1, max_size=30))
def test_a_clock_that_goes_back_earns_nothing(policy, gaps_ms):
    bucket, admitted = full(policy, START_MS), 0
    for gap_ms in [*gaps_ms, 0]:
        bucket, verdict = take(bucket, policy, 1, START_MS + gap_ms)
        admitted += verdict.allowed
        assert bucket.updated_ms == START_MS
    assert admitted <= policy.burst


def test_a_full_bucket_equals_a_new_one():
    policy = RatePolicy(60, 3)
    bucket, _ = take(full(policy, 0), policy, 2, 0)
    assert not is_full(bucket, policy, 1_999)
    assert is_full(bucket, policy, 2_000)


@pytest.mark.parametrize("cost", [0, -1])
def test_a_cost_below_one_is_refused(cost):
    policy = RatePolicy(60, 3)
    with pytest.raises(InvalidRequestError):
        take(full(policy, 0), policy, cost, 0)


@pytest.mark.parametrize("arguments", [(-1, 1), (10, 0), (10, 1, 11), (10, 1, 0, 1001), (10, 1, 0, -1)])
def test_an_impossible_policy_is_refused(arguments):
    with pytest.raises(ConfigurationError):
        RatePolicy(*arguments)


def test_an_empty_or_uneven_chain_is_refused():
    policy = RatePolicy(60, 3)
    with pytest.raises(InvalidRequestError):
        take_all((), (), 1, 0)
    with pytest.raises(InvalidRequestError):
        take_all((full(policy, 0),), (policy, policy), 1, 0)


def test_a_bucket_survives_its_encoding():
    bucket = Bucket(123_456_789, START_MS)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(bucket), type=Bucket) == bucket
