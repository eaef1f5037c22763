"""What producers write in one seed: tenants with tight quotas, requests, and whatever can be wrong with them.

All of it follows from the seed and is laid down before the simulation begins.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from settler_streams.events import (
    FlagAction,
    FlagCommand,
    FlagScope,
    InlineRecords,
    JobCancelRequested,
    JobRequested,
    MatchRules,
    Part,
    QueuePriority,
    QuotaType,
    Resource,
    TenantChanged,
    TenantStatus,
    TenantTier,
    UsageRecorded,
    encode,
    envelope,
)
from settler_streams.ids import PLATFORM, TenantId, partition_of
from tests.simulation.broker import BORN_MS

PARTITIONS = 2
STORM_S = 15.0
"""How long producers write and faults rage."""
REQUESTS = 18
ROOTS = [TenantId(f"a0000000-0000-4000-8000-{number:012x}") for number in range(3)]
CHILDREN = [TenantId(f"c0000000-0000-4000-8000-{number:012x}") for number in range(3)]
STRANGER = TenantId("e0000000-0000-4000-8000-000000000000")
_NOTHING = InlineRecords(rows=())
_TIERS = (TenantTier.FREE, TenantTier.STARTER, TenantTier.SCALE, TenantTier.ENTERPRISE)


@dataclass(frozen=True, slots=True)
class Write:
    """One record that a producer writes ``at_s`` seconds after the start; ``fault`` names what is wrong with it."""

    at_s: float
    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    fault: str | None = None


class Author:
    """Makes the records of one seed."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._number = 0
        self._tenants = [(root, root) for root in ROOTS] + list(zip(CHILDREN, ROOTS, strict=True))
        self._requests: list[Write] = []
        self._job_ids: list[tuple[str, TenantId, TenantId]] = []

    def writes(self) -> list[Write]:
        """Everything, by time."""
        random = self._random
        laid = [self._tenant(tenant, root, 1, 0.0) for tenant, root in self._tenants]
        laid += [self._request(random.random() * STORM_S) for _ in range(REQUESTS)]
        laid += [self._usage() for _ in range(5)]
        laid += [self._cancel() for _ in range(2)]
        laid += [self._tenant(*random.choice(self._tenants), random.randint(1, 3), self._moment()) for _ in range(2)]
        laid += [self._flag() for _ in range(2)]
        laid += [self._spoiled(random.choice(laid)) for _ in range(random.randint(1, 5))]
        return sorted(laid, key=lambda write: write.at_s)

    def _moment(self) -> float:
        return self._random.random() * STORM_S

    def _event(self, data: Part, tenant: TenantId, at_s: float, event_id: str | None = None) -> bytes:
        self._number += 1
        # A client's own time is a claim: now and then it is hours off.
        claimed_s = at_s if self._random.random() < 0.9 else at_s + self._random.choice((-86_400, 7_200))
        time = dt.datetime.fromtimestamp((BORN_MS + int(claimed_s * 1000)) / 1000, dt.UTC)
        event_id = event_id or f"b0000000-0000-7000-8000-{self._number:012x}"
        return encode(envelope(data, event_id=event_id, source="/producer", tenant=tenant, time=time))

    def _keyed(self, at_s: float, topic: str, root: TenantId, value: bytes) -> Write:
        return Write(at_s, topic, partition_of(root, PARTITIONS), root.encode(), value)

    def _tenant(self, tenant: TenantId, root: TenantId, version: int, at_s: float) -> Write:
        random = self._random
        quotas = {
            QuotaType.CONCURRENT_JOBS: random.randint(1, 4),
            QuotaType.MONTHLY_RECONCILIATIONS: random.randint(2, 9),
            QuotaType.RATE_LIMIT: random.choice((6, 60, 600)),
        }
        changed = TenantChanged(
            version=version,
            slug="t",
            tier=random.choice(_TIERS),
            status=TenantStatus.SUSPENDED if version > 1 and random.random() < 0.3 else TenantStatus.ACTIVE,
            root_id=root,
            parent_id=None if tenant == root else root,
            quotas=quotas,
            burst=random.randint(1, 6),
        )
        return self._keyed(at_s, "tenant-changes", root, self._event(changed, tenant, at_s))

    def _request(self, at_s: float) -> Write:
        random = self._random
        tenant, root = random.choice(self._tenants)
        if random.random() < 0.05:
            tenant = root = STRANGER
        request = JobRequested(
            kind="reconciliation" if random.random() < 0.95 else "unheard-of",
            priority=random.choice(tuple(QueuePriority)),
            left=_NOTHING,
            right=_NOTHING,
            rules=MatchRules(),
        )
        value = self._event(request, tenant, at_s)
        self._job_ids.append((f"b0000000-0000-7000-8000-{self._number:012x}", tenant, root))
        return self._keyed(at_s, "job-requests", root, value)

    def _cancel(self) -> Write:
        job_id, tenant, root = self._random.choice(self._job_ids)
        at_s = self._moment()
        return self._keyed(at_s, "job-requests", root, self._event(JobCancelRequested(job_id=job_id), tenant, at_s))

    def _usage(self) -> Write:
        tenant, root = self._random.choice(self._tenants)
        resource = self._random.choice((Resource.STORAGE_BYTES, Resource.CUSTOM_DOMAINS))
        used = UsageRecorded(resource=resource, quantity=self._random.randint(-50, 100))
        at_s = self._moment()
        return self._keyed(at_s, "usage-events", root, self._event(used, tenant, at_s))

    def _flag(self) -> Write:
        action = self._random.choice((FlagAction.KILL, FlagAction.REVIVE, FlagAction.SET))
        command = FlagCommand(flag="jobs.reconciliation", scope=FlagScope.GLOBAL, action=action, actor="operator")
        at_s = self._moment()
        value = self._event(command, PLATFORM, at_s)
        return Write(at_s, "flag-commands", partition_of("*", PARTITIONS), b"*", value)

    def _spoiled(self, write: Write) -> Write:
        """The same record once more, with something wrong."""
        how: Callable[[Write], Write] = self._random.choice(
            (_duplicate, _duplicate, _poison, _tombstone, _misplaced, _misplaced, _foreign, _keyless, _oversize, _alien)
        )
        return replace(how(write), at_s=min(STORM_S, write.at_s + self._random.random() * 8))


def _duplicate(write: Write) -> Write:
    return replace(write, fault="duplicate")


def _poison(write: Write) -> Write:
    return replace(write, value=b"\x00\xffno event" + (write.value or b"")[:20], fault="poison bytes")


def _tombstone(write: Write) -> Write:
    return replace(write, value=None, fault="tombstone")


def _misplaced(write: Write) -> Write:
    return replace(write, partition=1 - write.partition, fault="misplaced record")


def _foreign(write: Write) -> Write:
    """Under another root's key, and so, unless it lies there already, in a wrong partition, too."""
    other = next(root for root in ROOTS if root.encode() != write.key)
    return replace(write, key=other.encode(), fault="foreign key")


def _keyless(write: Write) -> Write:
    return replace(write, key=None, fault="no key")


def _oversize(write: Write) -> Write:
    return replace(write, value=(write.value or b"").ljust(MESSAGE_BYTES_MAX + 1), fault="oversize")


def _alien(write: Write) -> Write:
    """An event of a type that the topic does not carry."""
    return replace(write, topic="usage-events" if write.topic != "usage-events" else "job-requests", fault="alien type")


MESSAGE_BYTES_MAX = 4096
"""Small, so that oversize records cost the simulation little."""
