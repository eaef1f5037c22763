"""Accounts: charged at every level or at none, as the token bucket's theory has it, and each threshold told once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core import accounts, quotas
from settler_streams.core.accounts import THRESHOLDS_PERCENT, Account, admit
from settler_streams.core.token_bucket import UNITS_PER_TOKEN, Bucket, change_policy, take_all
from settler_streams.errors import RecordError
from settler_streams.events import QuotaType, RejectReason, Resource, TenantTier
from settler_streams.ids import TenantId
from tests.core.harness import START_MS
from tests.core.test_quotas import limits_of

MONTH = quotas.month_bounds(START_MS)


def account(name="t", **where):
    limits = limits_of(**where)
    return Account.of(TenantId(name), limits, quotas.new_usage(limits, START_MS))


def counts(one):
    return one.running, one.month_jobs, one.requests


def told(one):
    return [(signal.quota, signal.percent) for signal in one.crossed_thresholds()]


def bucket_of(one):
    return Bucket(one.units, one.updated_ms)


def test_an_account_and_its_stored_form_are_the_same():
    usage = quotas.Usage(Bucket(7, 8), 1, MONTH[0], 2, 3, 4, 5, {QuotaType.STORAGE: 80}, 6)
    assert Account.of(TenantId("t"), limits_of(), usage).usage() == usage


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
    chain = [account(str(place), overrides=overrides if place == refusing else None) for place in range(3)]
    if reason is RejectReason.RATE_LIMIT:
        chain[refusing].units = 0
    before = [one.usage() for one in chain]
    refusal = admit(chain, MONTH, START_MS + 1)
    assert refusal is not None
    assert refusal.reason is reason
    assert [one.usage() for one in chain] == before, "to the bit: a new owner knows of no refusal"


@pytest.mark.parametrize("limited", [0, 1])
def test_a_limit_that_waiting_does_not_mend_is_named_before_an_empty_bucket_at_any_level(limited):
    chain = [account("child"), account("root")]
    chain[limited].limits = limits_of(overrides={QuotaType.CONCURRENT_JOBS: 0})
    chain[1 - limited].units = 0
    refusal = admit(chain, MONTH, START_MS)
    assert refusal is not None
    assert refusal.reason is RejectReason.CONCURRENT_JOBS


def test_a_charge_and_its_release_meet_at_every_level():
    chain = [account(str(place)) for place in range(3)]
    assert admit(chain, MONTH, START_MS) is None
    assert [counts(one) for one in chain] == [(1, 1, 1)] * 3
    assert all(one.units == (60 - 1) * UNITS_PER_TOKEN for one in chain)
    for one in chain:
        one.release()
    assert [one.running for one in chain] == [0] * 3
    with pytest.raises(ValueError, match="no reservation"):
        chain[0].release()


def test_enterprise_is_metered_and_bound_by_nothing():
    one = account(tier=TenantTier.ENTERPRISE, overrides=dict.fromkeys(QuotaType, 0))
    bucket = bucket_of(one)
    assert admit([one], MONTH, START_MS + 5) is None
    assert counts(one) == (1, 1, 1)
    assert bucket_of(one) == bucket


rates = st.tuples(st.integers(0, 600), st.integers(1, 5))


@settings(max_examples=300, deadline=None)
@given(st.lists(rates, min_size=1, max_size=3), st.lists(st.integers(-50, 3_000), max_size=30))
def test_charging_in_place_equals_the_token_buckets_theory(policies, gaps):
    chain = [account(str(i), overrides={QuotaType.RATE_LIMIT: r}, burst=b) for i, (r, b) in enumerate(policies)]
    for one in chain:
        one.limits = limits_of(TenantTier.SCALE, {QuotaType.RATE_LIMIT: one.limits.rate.rate_per_minute},
                               one.limits.rate.burst)  # fmt: skip
    buckets, rates_ = [bucket_of(one) for one in chain], [one.limits.rate for one in chain]
    now_ms = START_MS
    for gap_ms in gaps:
        now_ms += gap_ms
        refusal = admit(chain, MONTH, now_ms)
        buckets, verdict = take_all(buckets, rates_, 1, now_ms)
        assert (refusal is None) == verdict.allowed
        if refusal is not None:
            assert refusal.retry_after_ms == verdict.retry_after_ms
            assert refusal.current == rates_[verdict.denied_by].burst - verdict.remaining
        later_ms = max(now_ms, START_MS) + 10_000
        assert [one.tokens_left(later_ms) for one in chain] == [
            change_policy(bucket, rate, rate, later_ms).level // UNITS_PER_TOKEN
            for bucket, rate in zip(buckets, rates_, strict=True)
        ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-300, 300), max_size=20))
def test_storage_and_domains_never_fall_below_zero(deltas):
    one, total = account(), 0
    for delta in deltas:
        total = max(0, total + delta)
        assert accounts.record([one], Resource.STORAGE_BYTES, delta)
        assert accounts.record([one], Resource.CUSTOM_DOMAINS, delta)
        assert one.storage_bytes == one.domains == total


@pytest.mark.parametrize("resource", [Resource.STORAGE_BYTES, Resource.CUSTOM_DOMAINS])
def test_a_count_beyond_64_bits_is_refused_at_any_level_and_changes_none(resource):
    child, parent = account("child"), account("parent")
    accounts.record([parent], resource, 2**63 - 1)
    before = [child.usage(), parent.usage()]
    with pytest.raises(RecordError, match="out-of-range"):
        accounts.record([child, parent], resource, 1)
    assert [child.usage(), parent.usage()] == before


def test_of_other_resources_no_account_is_kept():
    one = account()
    before = one.usage()
    assert not accounts.record([one], Resource.WORKER_US, 5)
    assert one.usage() == before


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 150), max_size=30), st.integers(1, 150))
def test_thresholds_are_signalled_when_reached_and_armed_again_below_the_lowest(stored, limit):
    one, signalled = account(overrides={QuotaType.STORAGE: limit}), set()
    for used in stored:
        one.storage_bytes = used
        over = {t for t in THRESHOLDS_PERCENT if 100 * used >= t * limit}
        assert told(one) == [(QuotaType.STORAGE, t) for t in sorted(over - signalled)]
        signalled = signalled | over if over else set()


def test_a_limit_of_zero_has_no_thresholds():
    one = account(overrides=dict.fromkeys(QuotaType, 0))
    one.storage_bytes = 5
    assert told(one) == []
    assert (one.quiet_from, one.month_quiet_below) == (0, accounts.COUNT_MAX)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(-1, 40), st.integers(0, 2)), min_size=1, max_size=30),
)
def test_what_is_quiet_has_nothing_to_say(concurrent, monthly, steps):
    """Whoever looks only where an account is not quiet hears what one who always looks hears."""
    overrides = {QuotaType.CONCURRENT_JOBS: concurrent, QuotaType.MONTHLY_RECONCILIATIONS: monthly}
    one, watched = account(overrides=overrides), account(overrides=overrides)
    for running, jobs in steps:
        for each in (one, watched):
            each.running = running if running >= 0 else each.running
            each.month_jobs += jobs
        assert told(watched) == ([] if one.is_quiet() else told(one))
        assert one.signalled == watched.signalled


def test_a_new_month_and_new_limits_are_looked_at_anew():
    one = account(overrides={QuotaType.MONTHLY_RECONCILIATIONS: 1})
    assert admit([one], MONTH, START_MS) is None
    assert told(one) == [(QuotaType.MONTHLY_RECONCILIATIONS, t) for t in THRESHOLDS_PERCENT]
    one.begin_month(MONTH[1])
    assert (one.month_jobs, one.signalled, one.month_quiet_below) == (0, {}, 0)
    assert told(one) == []
    one.change_limits(limits_of(overrides={QuotaType.CONCURRENT_JOBS: 1}), START_MS)
    assert (one.running, one.quiet_below) == (1, 0)
    assert told(one) == [(QuotaType.CONCURRENT_JOBS, t) for t in THRESHOLDS_PERCENT]


def test_whole_tokens_are_left():
    one = account()
    admit([one], MONTH, START_MS)
    assert [one.tokens_left(START_MS + later_ms) for later_ms in (0, 199, 200)] == [59, 59, 60]


def test_giving_back_takes_no_more_than_a_parent_holds():
    child, parent, root = (account(name) for name in ("child", "parent", "root"))
    for one, used in ((child, 5), (parent, 3), (root, 9)):
        one.storage_bytes = one.domains = used
    one = msgspec.structs.replace(child)
    accounts.give_back([child, parent, root])
    assert child == one
    assert [(each.storage_bytes, each.domains) for each in (parent, root)] == [(0, 0), (6, 6)]
