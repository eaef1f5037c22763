"""Events as a producer writes them."""

from __future__ import annotations

import datetime as dt
import time

from settler_streams.events import (
    InlineRecords,
    JobRequested,
    MatchRules,
    Part,
    TenantChanged,
    TenantStatus,
    TenantTier,
    encode,
    envelope,
)
from settler_streams.ids import JobId, TenantId, uuid7
from tests.runtime.kafka_log import KafkaLog

ROW = {"id": "1", "amount": "10.00", "currency": "EUR", "date": "2026-01-05", "reference": "A"}


def new_id() -> JobId:
    """The id of an event that happens now."""
    return JobId(uuid7(time.time_ns() // 1_000_000))


def event_bytes(data: Part, tenant: TenantId, *, event_id: str | None = None, source: str = "/test") -> bytes:
    """An event in its envelope."""
    now = dt.datetime.now(dt.UTC)
    return encode(envelope(data, event_id=event_id or new_id(), source=source, tenant=tenant, time=now))


def job_request(rows: int = 1) -> JobRequested:
    """A job whose sides hold the same rows."""
    records = InlineRecords(rows=tuple({**ROW, "id": str(number), "reference": f"R{number}"} for number in range(rows)))
    return JobRequested(left=records, right=records, rules=MatchRules())


async def register(log: KafkaLog, tenant: TenantId, partition: int, tier: TenantTier = TenantTier.ENTERPRISE) -> None:
    """Make a root tenant known."""
    changed = TenantChanged(version=1, slug="t", tier=tier, status=TenantStatus.ACTIVE, root_id=tenant)
    await log.append("tenant-changes", partition, [(tenant.encode(), event_bytes(changed, tenant))])
