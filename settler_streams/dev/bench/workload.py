"""The input that every program of the benchmark gets: tenants of mixed tiers, and their job requests.

Everything follows from a seed, so that two runs, and two programs of one run, get the same records.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Iterator
from dataclasses import dataclass

from settler_streams.events import (
    FileRecords,
    JobRequested,
    MatchRules,
    QueuePriority,
    QuotaType,
    TenantChanged,
    TenantStatus,
    TenantTier,
    encode,
    envelope,
)
from settler_streams.ids import TenantId, partition_of

SOURCE = "/bench/producer"
BEGINNING = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
"""The time in the events. A fold's clock is the broker's, so it decides nothing."""
CHILD_EVERY = 10
"""Each tenth tenant lies under its predecessor: its requests are charged to both."""
AMPLE = 1_000_000_000
"""A tenant's own limit where its tier's would end the measurement after a few hundred requests."""


@dataclass(frozen=True, slots=True)
class TierShare:
    """How many of 100 tenants are in a tier, how many of 100 requests are theirs, and which limits never bite."""

    tier: TenantTier
    tenants: int
    requests: int
    ample: tuple[QuotaType, ...] = ()


_ALL = (QuotaType.RATE_LIMIT, QuotaType.CONCURRENT_JOBS, QuotaType.MONTHLY_RECONCILIATIONS)
MIX = (
    TierShare(TenantTier.ENTERPRISE, tenants=5, requests=20),
    TierShare(TenantTier.SCALE, tenants=15, requests=40, ample=_ALL),
    TierShare(TenantTier.GROWTH, tenants=30, requests=25, ample=_ALL),
    TierShare(TenantTier.STARTER, tenants=30, requests=10),
    TierShare(TenantTier.FREE, tenants=20, requests=5, ample=(QuotaType.CONCURRENT_JOBS,)),
)
"""Large tenants send most. Starter tenants come to have too many open jobs, Free ones send too fast: about a tenth of
all is refused."""


@dataclass(frozen=True, slots=True)
class BenchTenant:
    """One tenant. ``parent`` is also its root; ``partition`` is where the root's records live."""

    id: TenantId
    share: TierShare
    parent: TenantId | None
    partition: int

    @property
    def root(self) -> TenantId:
        """The key of its records."""
        return self.parent or self.id


@dataclass(frozen=True, slots=True)
class Keyed:
    """One record as a producer sends it."""

    partition: int
    key: bytes
    value: bytes


def tenants(count: int, partitions: int, seed: int) -> list[BenchTenant]:
    """``count`` tenants, spread evenly over the partitions within each tier; a parent comes before its child."""
    drawn = random.Random(seed)  # noqa: S311 - repeatable, not secret
    made: list[BenchTenant] = []
    for share in MIX:
        roots = 0
        for number in range(max(1, count * share.tenants // 100)):
            if number % CHILD_EVERY == CHILD_EVERY - 1:
                parent = made[-1]
                made.append(BenchTenant(TenantId(uuid_of(drawn)), share, parent.id, parent.partition))
                continue
            wanted = roots % partitions
            roots += 1
            tenant_id = uuid_of(drawn)
            while partition_of(tenant_id, partitions) != wanted:
                tenant_id = uuid_of(drawn)
            made.append(BenchTenant(TenantId(tenant_id), share, None, wanted))
    return made


def tenant_changes(made: list[BenchTenant]) -> Iterator[Keyed]:
    """What makes the tenants known to admission."""
    for number, tenant in enumerate(made):
        body = TenantChanged(
            version=1,
            slug=f"bench-{number}",
            tier=tenant.share.tier,
            status=TenantStatus.ACTIVE,
            root_id=tenant.root,
            parent_id=tenant.parent,
            quotas=dict.fromkeys(tenant.share.ample, AMPLE),
            burst=AMPLE if QuotaType.RATE_LIMIT in tenant.share.ample else None,
        )
        event = envelope(body, event_id=tenant.id, source=SOURCE, tenant=tenant.id, time=BEGINNING, subject=tenant.id)
        yield Keyed(tenant.partition, tenant.root.encode(), encode(event))


def requests(made: list[BenchTenant], count: int, seed: int) -> Iterator[Keyed]:
    """``count`` requests, each with an id of its own, in an order drawn from ``seed``."""
    drawn = random.Random(seed)  # noqa: S311 - repeatable, not secret
    by_tier = [[tenant for tenant in made if tenant.share is share] for share in MIX]
    bounds = [sum(share.requests for share in MIX[: number + 1]) for number in range(len(MIX))]
    rules = MatchRules(keys=("reference",), amount_tolerance_minor=50, date_window_days=3)
    for number in range(count):
        point = drawn.random() * 100
        tier = next(index for index, bound in enumerate(bounds) if point < bound)
        tenant = by_tier[tier][int(drawn.random() * len(by_tier[tier]))]
        body = JobRequested(
            kind="reconciliation",
            priority=QueuePriority.HIGH if number % 7 == 0 else QueuePriority.NORMAL,
            estimated_cost_us=50_000 + number % 100_000,
            left=FileRecords(path=f"2026-01/ledger-{number % 10_000:05}.csv", format="csv"),
            right=FileRecords(path=f"2026-01/bank-{number % 10_000:05}.csv", format="csv"),
            rules=rules,
        )
        event = envelope(body, event_id=uuid_of(drawn), source=SOURCE, tenant=tenant.id, time=BEGINNING)
        yield Keyed(tenant.partition, tenant.root.encode(), encode(event))


def uuid_of(drawn: random.Random) -> str:
    """The next UUID, of version 7 by its form."""
    digits = f"{drawn.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-7{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"
