"""Quotas as values: what a tenant is allowed, what it has used, and what one more request would do.

A tenant draws on its own limits and on those of every parent up to its root: a request passes only if it passes at
every level, and is then charged at every level. Enterprise tenants bypass the limits and are metered all the same.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from settler_streams.core.fold import Value
from settler_streams.core.token_bucket import (
    UNITS_PER_TOKEN,
    Bucket,
    RatePolicy,
    change_policy,
    full,
    take_all,
    take_one,
)
from settler_streams.errors import RecordError
from settler_streams.events import QuotaThreshold, QuotaType, RejectReason, Resource, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.tiers import Tiers

THRESHOLDS_PERCENT = (80, 90, 100)
"""A signal is sent when use reaches each of these, once per window."""

COUNT_MAX = 2**63 - 1
"""What a count in an event can hold."""
BURST_MAX = 10**9
"""A bucket's level is stored in 64 bits; the tiers allow no greater burst either."""


class Tenant(Value, frozen=True, array_like=True):
    """What decisions need to know of a tenant, as of its ``version``."""

    version: int
    tier: TenantTier
    status: TenantStatus
    root_id: TenantId
    parent_id: TenantId | None
    quotas: dict[QuotaType, int]
    burst: int | None


class Usage(Value, frozen=True, array_like=True):
    """What a tenant (with its children) has used. ``running`` counts admitted, unfinished jobs."""

    bucket: Bucket
    running: int = 0
    month_start_ms: int = 0
    month_jobs: int = 0
    storage_bytes: int = 0
    domains: int = 0
    requests: int = 0
    signalled: dict[QuotaType, int] = msgspec.field(default_factory=dict)
    """The highest threshold already signalled per quota."""
    changed_in: int = 0
    """The round of usage reports that will tell this change."""


class Reports(Value, frozen=True, array_like=True):
    """How many rounds of usage reports have been sent; a usage that changed in the present one is reported next."""

    rounds: int


class Reservation(Value, frozen=True, array_like=True):
    """An admitted, unfinished job."""

    tenant: TenantId
    chain: tuple[TenantId, ...]
    admitted_at_ms: int
    source: str


@dataclass(frozen=True, slots=True)
class Limits:
    """A tenant's effective limits: its overrides over its tier's defaults.

    ``capacity`` and ``refill_per_ms`` are those of ``rate``; ``concurrent`` and ``monthly`` are two of ``by_quota``:
    all at hand for every decision. ``calm_below`` says up to where running and monthly jobs reach no threshold.
    """

    rate: RatePolicy
    capacity: int
    refill_per_ms: int
    by_quota: dict[QuotaType, int]
    weight: int
    enterprise: bool
    max_running: int
    concurrent: int
    monthly: int
    calm_below: tuple[int, int]

    @classmethod
    def of(cls, tenant: Tenant, tiers: Tiers) -> Limits:
        """The effective limits of ``tenant``."""
        tier = tiers[tenant.tier]
        by_quota = tier.limits() | tenant.quotas
        rate = by_quota[QuotaType.RATE_LIMIT]
        burst = tenant.burst or min(tier.burst, max(1, rate))
        concurrent, monthly = by_quota[QuotaType.CONCURRENT_JOBS], by_quota[QuotaType.MONTHLY_RECONCILIATIONS]
        policy = RatePolicy(rate_per_minute=rate, burst=burst)
        return cls(
            policy,
            policy.capacity(),
            policy.refill_per_ms(),
            by_quota,
            tier.weight,
            tier.enterprise,
            tier.max_running,
            concurrent,
            monthly,
            (_calm_below(concurrent), _calm_below(monthly)),
        )


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Which limit refused, how far it is used, and when trying again makes sense."""

    reason: RejectReason
    quota: QuotaType
    current: int
    limit: int
    retry_after_ms: int | None


class Level(msgspec.Struct, gc=False):
    """One level of a tenant's chain (the tenant itself, a parent, the root): what it may use, and what it has used."""

    tenant_id: TenantId
    limits: Limits
    usage: Usage


def month_bounds(now_ms: int) -> tuple[int, int]:
    """Start and end (exclusive) of the UTC calendar month that holds ``now_ms``, in milliseconds."""
    now = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    start = dt.datetime(now.year, now.month, 1, tzinfo=dt.UTC)
    following = dt.datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=dt.UTC)
    return int(start.timestamp()) * 1000, int(following.timestamp()) * 1000


def new_usage(limits: Limits, now_ms: int) -> Usage:
    """A tenant that has used nothing; its bucket is full."""
    return Usage(bucket=full(limits.rate, now_ms))


def admit(
    levels: Sequence[Level], month: tuple[int, int], now_ms: int, reports: int = 0
) -> tuple[Sequence[Usage], Refusal | None]:
    """What one more job would be charged at every level, or why there can be none: a denial consumes nothing.

    ``reports`` is the round of usage reports that would tell it.
    """
    if len(levels) == 1:
        return _admit_alone(levels[0], month, now_ms, reports)
    rolled = [_roll(level.usage, month[0]) for level in levels]
    buckets = [usage.bucket for usage in rolled]
    if not levels[0].limits.enterprise:
        if (refusal := _hard_limits(levels, rolled, month, now_ms)) is not None:
            return (), refusal
        for place, level in enumerate(levels):
            bucket = take_one(buckets[place], level.limits.capacity, level.limits.refill_per_ms, now_ms)
            if bucket is None:
                return (), _rate_refusal(levels, rolled, now_ms)
            buckets[place] = bucket
    return [_charged(usage, bucket, reports) for usage, bucket in zip(rolled, buckets, strict=True)], None


def _admit_alone(
    level: Level, month: tuple[int, int], now_ms: int, reports: int
) -> tuple[Sequence[Usage], Refusal | None]:
    """As :func:`admit` for a tenant without parents, as most are; in one go."""
    usage, limits = level.usage, level.limits
    if usage.month_start_ms != month[0]:
        usage = _roll(usage, month[0])
    if limits.enterprise:
        return (_charged(usage, usage.bucket, reports),), None
    if usage.running >= limits.concurrent or usage.month_jobs >= limits.monthly:
        return (), _hard_limits((level,), (usage,), month, now_ms)
    bucket = take_one(usage.bucket, limits.capacity, limits.refill_per_ms, now_ms)
    if bucket is None:
        return (), _rate_refusal((level,), (usage,), now_ms)
    return (_charged(usage, bucket, reports),), None


def _charged(usage: Usage, bucket: Bucket, reports: int) -> Usage:
    """One job more. Spelt out, in the order of the fields: `replace` would cost three times as much, per request."""
    return Usage(
        bucket,
        usage.running + 1,
        usage.month_start_ms,
        usage.month_jobs + 1,
        usage.storage_bytes,
        usage.domains,
        usage.requests + 1,
        usage.signalled,
        reports,
    )


def release(usage: Usage) -> Usage:
    """A job of this level has finished.

    Raises:
        ValueError: more jobs would end than were admitted; a reservation ends exactly once.
    """
    if usage.running < 1:
        raise ValueError("a job finished that holds no reservation")
    return msgspec.structs.replace(usage, running=usage.running - 1)


def record(levels: Sequence[Level], resource: Resource, quantity: int) -> list[Usage]:
    """Storage or domains that the first level's tenant takes (positive) or gives back, at each level.

    Each level changes by as much as the one below it. So whoever gives back more than there is takes nothing from what
    others hold under the same parent. Empty for any other resource.

    Raises:
        RecordError: ``out-of-range``; a sum needs more than 64 bits.
    """
    usages: list[Usage] = []
    for usage in [level.usage for level in levels]:
        match resource:
            case Resource.STORAGE_BYTES:
                usages.append(record_storage(usage, quantity))
                quantity = usages[-1].storage_bytes - usage.storage_bytes
            case Resource.CUSTOM_DOMAINS:
                usages.append(record_domains(usage, quantity))
                quantity = usages[-1].domains - usage.domains
    return usages


def record_storage(usage: Usage, delta_bytes: int) -> Usage:
    """Storage taken (positive) or given back; it never falls below zero.

    Raises:
        RecordError: ``out-of-range``; the sum needs more than 64 bits.
    """
    return msgspec.structs.replace(usage, storage_bytes=_total(usage.storage_bytes, delta_bytes))


def record_domains(usage: Usage, delta: int) -> Usage:
    """Custom domains added (positive) or removed; never below zero.

    Raises:
        RecordError: ``out-of-range``; the sum needs more than 64 bits.
    """
    return msgspec.structs.replace(usage, domains=_total(usage.domains, delta))


def without(levels: Sequence[Level]) -> list[Usage]:
    """The parents' usage when the first level's tenant is no more, each given back what the one below it is.

    That is storage and domains; the month is spent.
    """
    storage_bytes, domains = levels[0].usage.storage_bytes, levels[0].usage.domains
    usages = []
    for usage in [level.usage for level in levels[1:]]:
        storage_bytes, domains = min(storage_bytes, usage.storage_bytes), min(domains, usage.domains)
        left = {"storage_bytes": usage.storage_bytes - storage_bytes, "domains": usage.domains - domains}
        usages.append(msgspec.structs.replace(usage, **left))
    return usages


def _total(used: int, delta: int) -> int:
    total = max(0, used + delta)
    if total > COUNT_MAX:
        raise RecordError("out-of-range", f"{used} and {delta} more are beyond 64 bits")
    return total


def with_bucket(usage: Usage, bucket: Bucket) -> Usage:
    """The same usage with another bucket."""
    return msgspec.structs.replace(usage, bucket=bucket)


def in_round(usage: Usage, reports: int) -> Usage:
    """The same usage, changed in this round of usage reports."""
    return usage if usage.changed_in == reports else msgspec.structs.replace(usage, changed_in=reports)


def tokens_left(usage: Usage, limits: Limits, now_ms: int) -> int:
    """Whole tokens in the rate limit's bucket at ``now_ms``."""
    settled = change_policy(usage.bucket, limits.rate, limits.rate, now_ms)
    return settled.level // UNITS_PER_TOKEN


def used_of(usage: Usage, quota: QuotaType) -> int:
    """How much of ``quota`` is in use; for the rate limit see the bucket."""
    return {
        QuotaType.CONCURRENT_JOBS: usage.running,
        QuotaType.MONTHLY_RECONCILIATIONS: usage.month_jobs,
        QuotaType.STORAGE: usage.storage_bytes,
        QuotaType.CUSTOM_DOMAINS: usage.domains,
    }.get(quota, 0)


def threshold(usage: Usage, limits: Limits, quota: QuotaType, percent: int) -> QuotaThreshold:
    """The signal that ``percent`` of ``quota`` is reached."""
    return QuotaThreshold(
        quota=quota,
        percent=percent,
        used=used_of(usage, quota),
        limit=limits.by_quota[quota],
        window_start_ms=usage.month_start_ms if quota is QuotaType.MONTHLY_RECONCILIATIONS else 0,
    )


def is_calm(usage: Usage, limits: Limits) -> bool:
    """Whether it is plain that :func:`crossed_thresholds` has nothing to say."""
    running, month_jobs = limits.calm_below
    return (
        usage.running < running
        and usage.month_jobs < month_jobs
        and not (usage.signalled or usage.storage_bytes or usage.domains)
    )


def crossed_thresholds(usage: Usage, limits: Limits) -> tuple[Usage, list[tuple[QuotaType, int]]]:
    """The thresholds newly reached, each reported once; one is armed again when use has fallen below the lowest."""
    reached: list[tuple[QuotaType, int]] = []
    signalled = usage.signalled
    for quota, limit in limits.by_quota.items():
        if quota is QuotaType.RATE_LIMIT or limit == 0:
            continue
        percent = used_of(usage, quota) * 100 // limit
        before = signalled.get(quota, 0)
        highest = max((t for t in THRESHOLDS_PERCENT if percent >= t), default=0)
        if highest > before:
            reached += [(quota, t) for t in THRESHOLDS_PERCENT if before < t <= highest]
            signalled = signalled | {quota: highest}
        elif highest == 0 and before:
            signalled = {q: t for q, t in signalled.items() if q is not quota}
    if signalled is usage.signalled:
        return usage, reached
    return msgspec.structs.replace(usage, signalled=signalled), reached


def _calm_below(limit: int) -> int:
    """The least use that reaches the lowest threshold; a limit of zero has none."""
    return -(-limit * THRESHOLDS_PERCENT[0] // 100) if limit else COUNT_MAX


def _roll(usage: Usage, month_start_ms: int) -> Usage:
    """Begin a new month's count when the month has changed; a closed month is never rewritten."""
    if usage.month_start_ms == month_start_ms:
        return usage
    signalled = {q: t for q, t in usage.signalled.items() if q is not QuotaType.MONTHLY_RECONCILIATIONS}
    return msgspec.structs.replace(usage, month_start_ms=month_start_ms, month_jobs=0, signalled=signalled)


def _hard_limits(
    levels: Sequence[Level], usages: Sequence[Usage], month: tuple[int, int], now_ms: int
) -> Refusal | None:
    for level, usage in zip(levels, usages, strict=True):
        limit = level.limits.concurrent
        if usage.running >= limit:
            return Refusal(RejectReason.CONCURRENT_JOBS, QuotaType.CONCURRENT_JOBS, usage.running, limit, None)
        limit = level.limits.monthly
        if usage.month_jobs >= limit:
            quota = QuotaType.MONTHLY_RECONCILIATIONS
            return Refusal(
                RejectReason.MONTHLY_RECONCILIATIONS, quota, usage.month_jobs, limit, max(0, month[1] - now_ms)
            )
    return None


def _rate_refusal(levels: Sequence[Level], usages: Sequence[Usage], now_ms: int) -> Refusal:
    """Who holds the request back longest, and for how long."""
    buckets, policies = [usage.bucket for usage in usages], [level.limits.rate for level in levels]
    verdict = take_all(buckets, policies, 1, now_ms)[1]
    policy = policies[verdict.denied_by]
    return Refusal(
        RejectReason.RATE_LIMIT,
        QuotaType.RATE_LIMIT,
        policy.burst - verdict.remaining,
        policy.rate_per_minute,
        verdict.retry_after_ms,
    )
