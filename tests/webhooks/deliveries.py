"""What tests of the courier share: events that are queued, a courier in this process, and what became of deliveries."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import msgspec

from settler_streams.adapters.postgres import queries as projection_queries
from settler_streams.adapters.postgres.effects import WebhookEvent
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.courier.lane import Lane, new_lease
from settler_streams.courier.process import Courier
from settler_streams.courier.sender import Sender
from settler_streams.events import JobFinished, JobStatus
from settler_streams.ids import TenantId
from settler_streams.services.webhooks import Delivery, WebhookService
from tests.runtime.requests import event_bytes, new_id
from tests.webhooks.endpoint import WAIT_S_MAX

if TYPE_CHECKING:
    from settler_streams.settings import Settings

FINISHED = "settler.job.finished.v1"


def finished(tenant: TenantId, *, appended_at_ms: int | None = None, event_type: str = FINISHED) -> WebhookEvent:
    """An event as the webhooks agent queues it."""
    event_id = new_id()
    body = JobFinished(
        job_id=new_id(), kind="reconciliation", status=JobStatus.SUCCEEDED, attempt=1, requested_at_ms=1,
        finished_at_ms=2, worker_us=5, matches=1,
    )  # fmt: skip
    return WebhookEvent(
        tenant_id=tenant,
        event_id=event_id,
        event_type=event_type,
        body=event_bytes(body, tenant, event_id=event_id).decode(),
        appended_at_ms=appended_at_ms or time.time_ns() // 1_000_000,
        source_version=0,
    )


async def queue(pool: TenantConnectionPool, *events: WebhookEvent) -> None:
    """Project ``events`` in one batch."""
    async with pool.platform() as tx:
        await tx.execute(projection_queries.PROJECT_BATCH, batch_of(*events))


def batch_of(*events: WebhookEvent) -> str:
    """What the recorder gives PostgreSQL of ``events``."""
    batch: dict[str, dict[str, list[WebhookEvent]]] = {}
    for event in events:
        batch.setdefault(event.tenant_id, {}).setdefault(event.KIND, []).append(event)
    return msgspec.json.encode(batch).decode()


async def leased(pool: TenantConnectionPool, tenant: TenantId, webhook_id: str) -> Lane:
    """The webhook's lane, leased for a minute."""
    lane = Lane(tenant, webhook_id, new_lease())
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "UPDATE webhook_lanes SET lease_id = $2, leased_until = now() + interval '1 minute' WHERE webhook_id = $1",
            webhook_id, lane.lease_id,
        )  # fmt: skip
    return lane


async def somebody_waits(pool: TenantConnectionPool) -> None:
    """Return once a transaction waits for a lock."""
    async with asyncio.timeout(WAIT_S_MAX), pool.platform() as tx:
        while not await tx.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass


@contextlib.asynccontextmanager
async def courier(pool: TenantConnectionPool, settings: Settings) -> AsyncIterator[Courier]:
    """A courier at work."""
    stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with Sender(settings) as sender:
        working = Courier(pool, sender, settings)
        task = asyncio.create_task(working.run(stop))
        try:
            yield working
        finally:
            stop.set_result(None)
            await task


async def ended(
    service: WebhookService,
    tenant: TenantId,
    webhook_id: str,
    count: int,
    status: str = "delivered",
    *,
    until: Callable[[Delivery], bool] = lambda _: True,
) -> list[Delivery]:
    """The deliveries of this status, once there are ``count`` of them that satisfy ``until``."""
    found: list[Delivery] = []
    async with asyncio.timeout(WAIT_S_MAX):
        while len(found) < count:
            recent = await service.deliveries.recent(tenant, webhook_id, status=status, limit=1000)
            found = [delivery for delivery in recent if until(delivery)]
    assert len(found) == count
    return found
