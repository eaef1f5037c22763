"""Quota values: months by the calendar, and what a tenant is allowed."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core import quotas
from settler_streams.core.quotas import Limits, Tenant
from settler_streams.events import QuotaType, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.tiers import load_tiers


def limits_of(tier=TenantTier.STARTER, overrides=None, burst=None):
    tenant = Tenant(1, tier, TenantStatus.ACTIVE, TenantId("t"), None, overrides or {}, burst)
    return Limits.of(tenant, load_tiers())


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
