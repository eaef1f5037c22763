"""Quota values: months by the calendar, charges at every level or none, thresholds once."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core import quotas
from settler_streams.core.quotas import Level, Limits, Tenant
from settler_streams.core.token_bucket import UNITS_PER_TOKEN, Bucket
from settler_streams.errors import RecordError
from settler_streams.events import QuotaType, RejectReason, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.tiers import load_tiers
from tests.core.harness import START_MS

MONTH = quotas.month_bounds(START_MS)


def limits_of(tier=TenantTier.STARTER, overrides=None, burst=None):
    tenant = Tenant(1, tier, TenantStatus.ACTIVE, TenantId("t"), None, overrides or {}, burst)
    return Limits.of(tenant, load_tiers())


def level(name="t", **where):
    limits = limits_of(**where)
    return Level(TenantId(name), limits, quotas.new_usage(limits, START_MS))


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 253_402_300_799_999 - 62 * 86_400_000))
def test_a_month_holds_its_moment_and_months_join(now_ms):
    start_ms, end_ms = quotas.month_bounds(now_ms)
    assert start_ms <= now_ms < end_ms
    first, following = (dt.datetime.fromtimestamp(ms // 1000, dt.UTC) for ms in (start_ms, end_ms))
    for day in (first, following):
        assert (day.day, day.hour, day.minute, day.second) == (1, 0, 0, 0)
    assert (following.year * 12 + following.month) - (first.year * 12 + first.month) == 1
    assert quotas.month_bounds(end_ms - 1) == (start_ms, end_ms)
    assert quotas.month_bounds(end_ms)[0] == end_ms


@pytest.mark.parametrize("tier", list(TenantTier))
def test_a_tiers_defaults_hold_unless_overridden(tier):
    defaults = load_tiers()[tier]
    limits = limits_of(tier)
    assert limits.by_quota == defaults.limits()
    assert (limits.rate.rate_per_minute, limits.rate.burst) == (defaults.rate_limit, defaults.burst)
    overridden = limits_of(tier, {QuotaType.RATE_LIMIT: 3})
    assert (overridden.rate.rate_per_minute, overridden.rate.burst) == (3, 3), "no burst beyond a lowered rate"
    assert limits_of(tier, {QuotaType.RATE_LIMIT: 0}).rate.burst == 1
    assert limits_of(tier, {}, 12).rate.burst == 12


@pytest.mark.parametrize("refusing", [0, 1, 2])
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({QuotaType.CONCURRENT_JOBS: 0}, RejectReason.CONCURRENT_JOBS),
        ({QuotaType.MONTHLY_RECONCILIATIONS: 0}, RejectReason.MONTHLY_RECONCILIATIONS),
        (None, RejectReason.RATE_LIMIT),
    ],
)
def test_one_refusing_level_charges_none(refusing, overrides, reason):
    levels = [level(str(place), overrides=overrides if place == refusing else None) for place in range(3)]
    if reason is RejectReason.RATE_LIMIT:
        empty = quotas.with_bucket(levels[refusing].usage, Bucket(UNITS_PER_TOKEN - 1, START_MS))
        levels[refusing] = Level(TenantId("t"), levels[refusing].limits, empty)
    usages, refusal = quotas.admit(levels, MONTH, START_MS)
    assert refusal is not None
    assert refusal.reason is reason
    assert usages == ()
    assert [(one.usage.running, one.usage.month_jobs, one.usage.requests) for one in levels] == [(0, 0, 0)] * 3


def test_a_charge_and_its_release_meet_at_every_level():
    levels = [level(str(place)) for place in range(3)]
    usages, refusal = quotas.admit(levels, MONTH, START_MS)
    assert refusal is None
    assert [(u.running, u.month_jobs, u.requests) for u in usages] == [(1, 1, 1)] * 3
    assert all(u.bucket.level == (60 - 1) * UNITS_PER_TOKEN for u in usages)
    released = [quotas.release(usage) for usage in usages]
    assert [u.running for u in released] == [0] * 3
    with pytest.raises(ValueError, match="no reservation"):
        quotas.release(released[0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-300, 300), max_size=20))
def test_storage_and_domains_never_fall_below_zero(deltas):
    usage, total = level().usage, 0
    for delta in deltas:
        total = max(0, total + delta)
        usage = quotas.record_domains(quotas.record_storage(usage, delta), delta)
        assert usage.storage_bytes == usage.domains == total


@pytest.mark.parametrize("record", [quotas.record_storage, quotas.record_domains])
def test_a_count_beyond_64_bits_is_refused(record):
    usage = record(level().usage, 2**63 - 1)
    with pytest.raises(RecordError, match="out-of-range"):
        record(usage, 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 150), max_size=30), st.integers(1, 150))
def test_thresholds_are_signalled_when_reached_and_armed_again_below_the_lowest(levels, limit):
    limits = limits_of(overrides={QuotaType.STORAGE: limit})
    usage, signalled = level().usage, set()
    for stored in levels:
        usage = quotas.record_storage(usage, stored - usage.storage_bytes)
        usage, reached = quotas.crossed_thresholds(usage, limits)
        over = {t for t in (80, 90, 100) if 100 * stored >= t * limit}
        assert reached == [(QuotaType.STORAGE, t) for t in sorted(over - signalled)]
        signalled = signalled | over if over else set()


def test_a_limit_of_zero_has_no_thresholds():
    limits = limits_of(overrides=dict.fromkeys(QuotaType, 0))
    usage = quotas.record_storage(level().usage, 5)
    assert quotas.crossed_thresholds(usage, limits) == (usage, [])


def test_whole_tokens_are_left():
    one = level()
    (usage,), _ = quotas.admit([one], MONTH, START_MS)
    assert quotas.tokens_left(usage, one.limits, START_MS) == 59
    assert quotas.tokens_left(usage, one.limits, START_MS + 199) == 59
    assert quotas.tokens_left(usage, one.limits, START_MS + 200) == 60
