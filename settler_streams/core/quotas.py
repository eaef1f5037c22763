"""Quotas as values: what a tenant is allowed, and what it has used. How the one changes with the other, and what is
refused, is told by :mod:`settler_streams.core.accounts`.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import msgspec

from settler_streams.core.fold import Value
from settler_streams.core.token_bucket import Bucket, RatePolicy, full
from settler_streams.events import QuotaType, RejectReason, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.tiers import Tiers

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


@dataclass(frozen=True, slots=True)
class Limits:
    """A tenant's effective limits: its overrides over its tier's defaults.

    ``capacity`` and ``refill_per_ms`` are those of ``rate``; ``concurrent`` and ``monthly`` are two of ``by_quota``:
    all at hand for every decision.
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
        )


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Which limit refused, how far it is used, and when trying again makes sense."""

    reason: RejectReason
    quota: QuotaType
    current: int
    limit: int
    retry_after_ms: int | None


def month_bounds(now_ms: int) -> tuple[int, int]:
    """Start and end (exclusive) of the UTC calendar month that holds ``now_ms``, in milliseconds."""
    now = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    start = dt.datetime(now.year, now.month, 1, tzinfo=dt.UTC)
    following = dt.datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=dt.UTC)
    return int(start.timestamp()) * 1000, int(following.timestamp()) * 1000


def new_usage(limits: Limits, now_ms: int) -> Usage:
    """A tenant that has used nothing; its bucket is full."""
    return Usage(bucket=full(limits.rate, now_ms))
