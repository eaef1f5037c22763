"""Which events are queued for which webhooks: once each, bounded, and together with the position behind them."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from settler_streams.adapters.postgres.projection import PositionMove, init_position, read_positions, write_batch
from settler_streams.adapters.postgres.tenant_schemas import move
from settler_streams.courier import lane as courier_lane
from settler_streams.courier.lane import LaneRunner
from settler_streams.courier.sender import Sender
from settler_streams.errors import FencedError
from settler_streams.services.webhooks import WebhookService
from settler_streams.services.webhooks import service as webhook_service
from tests.webhooks.deliveries import FINISHED, courier, ended, finished, leased, queue, somebody_waits
from tests.webhooks.endpoint import listening

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.ids import TenantId
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services

URL = "https://hooks.example/in"
QUEUED_MAX = 50_000


async def queued(service: WebhookService, tenant: TenantId, webhook_id: str) -> set[str]:
    return {delivery.event_id for delivery in await service.deliveries.recent(tenant, webhook_id, limit=1000)}


async def deliver(pool: TenantConnectionPool, tenant: TenantId, webhook_id: str, count: int) -> None:
    """As if so many events had been delivered eight days ago."""
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body, status, finished_at) "
            "SELECT $1, $2, gen_random_uuid(), 't', '{}', 'delivered', now() - interval '8 days' "
            "FROM generate_series(1, $3)",
            tenant, webhook_id, count,
        )  # fmt: skip


async def test_an_event_is_queued_once_for_each_webhook_that_wants_it(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    mine, theirs = await new_tenant(), await new_tenant()
    everything = (await service.create(mine, URL)).webhook_id
    results = (await service.create(mine, URL, [FINISHED])).webhook_id
    foreign = (await service.create(theirs, URL)).webhook_id
    result, decision = finished(mine), finished(mine, event_type="settler.job.decided.v1")
    stranger = finished(await new_tenant())
    for _ in range(2):
        await queue(pool, result, decision, result, stranger)
    assert await queued(service, mine, everything) == {result.event_id, decision.event_id}
    assert await queued(service, mine, results) == {result.event_id}
    assert await queued(service, theirs, foreign) == set()
    async with pool.tenant(mine) as tx:
        assert await tx.fetchval("SELECT body FROM webhook_deliveries WHERE webhook_id = $1", results) == result.body


async def test_a_batch_has_events_of_several_tenants_each_for_its_own_webhooks(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenants = [await new_tenant() for _ in range(4)]
    mine = {tenant: [(await service.create(tenant, URL)).webhook_id for _ in range(2)] for tenant in tenants[:3]}
    await move(settings, tenants[1], own_schema=True)
    events = {tenant: [finished(tenant) for _ in range(2)] for tenant in tenants}
    async with pool.tenant(tenants[0]) as tx:
        await tx.execute("UPDATE webhook_lanes SET due_at = 'infinity'")
        due = await tx.fetch("SELECT webhook_id FROM webhook_lanes WHERE due_at <= now()")
    assert not due
    await queue(pool, *(pair[0] for pair in events.values()), *(pair[1] for pair in events.values()))
    for tenant, webhooks in mine.items():
        for webhook_id in webhooks:
            assert await queued(service, tenant, webhook_id) == {event.event_id for event in events[tenant]}
        async with pool.tenant(tenant) as tx:
            due = await tx.fetch("SELECT webhook_id::text FROM webhook_lanes WHERE due_at <= now() AND skipped = 0")
        assert {row[0] for row in due} == set(webhooks)
    async with pool.tenant(tenants[3]) as tx:
        assert not await tx.fetch("SELECT FROM webhook_deliveries UNION ALL SELECT FROM webhook_lanes")


async def test_what_happened_before_a_webhook_was_made_is_not_for_it(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    now_ms = time.time_ns() // 1_000_000
    webhook_id = (await service.create(tenant, URL)).webhook_id
    old, recent = finished(tenant, appended_at_ms=now_ms - 120_000), finished(tenant, appended_at_ms=now_ms - 30_000)
    await queue(pool, old, recent)
    assert await queued(service, tenant, webhook_id) == {recent.event_id}, "a minute's grace for clocks that differ"


async def test_a_full_queue_counts_what_it_passes_over(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    full, empty = [(await service.create(tenant, URL)).webhook_id for _ in range(2)]
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body) "
            "SELECT $1, $2, gen_random_uuid(), 't', '{}' FROM generate_series(1, $3)",
            tenant, full, QUEUED_MAX - 2,
        )  # fmt: skip
    await queue(pool, *(finished(tenant) for _ in range(5)))
    found = {webhook.id: webhook for webhook in await service.list(tenant)}
    assert (found[full].pending, found[full].skipped) == (QUEUED_MAX, 3)
    assert (found[empty].pending, found[empty].skipped) == (5, 0)


async def test_a_webhook_that_is_being_removed_costs_the_others_nothing(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    kept, removed = [(await service.create(tenant, URL)).webhook_id for _ in range(2)]
    event = finished(tenant)
    async with pool.tenant(tenant) as tx:
        await tx.execute("DELETE FROM webhooks WHERE tenant_id = $1 AND id = $2", tenant, removed)
        queueing = asyncio.create_task(queue(pool, event))
        await somebody_waits(pool)
    await queueing
    assert await queued(service, tenant, kept) == {event.event_id}
    assert [webhook.id for webhook in await service.list(tenant)] == [kept]


async def test_a_webhook_with_many_deliveries_is_removed_in_batches_for_which_nobody_waits(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_service, "REMOVED_MAX", 3)
    tenant = await new_tenant()
    kept, removed = [(await service.create(tenant, URL)).webhook_id for _ in range(2)]
    await deliver(pool, tenant, removed, 8)
    event = finished(tenant)
    async with pool.tenant(tenant) as tx:
        await tx.execute("SELECT FROM webhook_deliveries ORDER BY event_id DESC LIMIT 1 FOR UPDATE")
        removing = asyncio.create_task(service.delete(tenant, removed))
        await somebody_waits(pool)
        await queue(pool, event)
        removing.cancel()
        await asyncio.wait([removing])
    assert await queued(service, tenant, kept) == {event.event_id}
    webhook = await service.get(tenant, removed)
    assert (webhook.status, webhook.disabled_reason) == ("disabled", "removing")
    assert len(await queued(service, tenant, removed)) == 2, "two batches of three had gone"
    await service.delete(tenant, removed)
    assert [webhook.id for webhook in await service.list(tenant)] == [kept]
    async with pool.tenant(tenant) as tx:
        assert await tx.fetchval("SELECT count(*) FROM webhook_deliveries WHERE webhook_id = $1", removed) == 0
        assert await tx.fetchval("SELECT count(*) FROM webhook_lanes WHERE webhook_id = $1", removed) == 0
        said = await tx.fetch(
            "SELECT action FROM audit_logs WHERE subject = $1 ORDER BY recorded_at, id", f"webhook/{removed}"
        )
    assert [row["action"] for row in said] == ["webhook.created", "webhook.disabled", "webhook.removed"]


async def test_the_position_moves_with_the_queue(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant, topic_id = await new_tenant(), str(uuid.uuid4())
    webhook_id = (await service.create(tenant, URL)).webhook_id
    first, second = finished(tenant), finished(tenant)
    await init_position(pool, "t.webhooks", topic_id, "t.job-results", 0)
    step = PositionMove("t.webhooks", topic_id, "t.job-results", 0, old_next_offset=0, new_next_offset=2)
    await write_batch(pool, step, [[first], []])
    with pytest.raises(FencedError):
        await write_batch(pool, step, [[second], []])
    assert await queued(service, tenant, webhook_id) == {first.event_id}
    assert [position.next_offset for position in await read_positions(pool, "t.webhooks")] == [2]


async def test_ended_deliveries_are_tidied_away_in_their_time(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    ages = {"delivered": (6, 8), "dead": (8, 29, 31)}
    async with listening() as endpoint:
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        async with pool.tenant(tenant) as tx:
            for status, days in ages.items():
                for age in days:
                    await tx.execute(
                        "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body, status, "
                        "finished_at) VALUES ($1, $2, gen_random_uuid(), 't', '{}', $3, now() - $4::interval)",
                        tenant, webhook_id, status, dt.timedelta(days=age),
                    )  # fmt: skip
        event = finished(tenant)
        await queue(pool, event)
        async with courier(pool, settings):
            await endpoint.received(1)
    left = await service.deliveries.recent(tenant, webhook_id)
    assert sorted(delivery.status for delivery in left) == ["dead", "dead", "delivered", "delivered"]
    async with pool.tenant(tenant) as tx:
        due_in = await tx.fetchval("SELECT due_at - now() FROM webhook_lanes WHERE webhook_id = $1", webhook_id)
    assert dt.timedelta(hours=23) < due_in < dt.timedelta(hours=25), "an idle lane is looked after once a day"
    assert [d.event_id for d in await ended(service, tenant, webhook_id, 1, until=lambda d: d.attempts == 1)] == [
        event.event_id
    ]


async def test_a_quiet_webhook_is_visited_every_few_seconds_until_all_is_tidied_away(
    pool: TenantConnectionPool,
    settings: Settings,
    service: WebhookService,
    new_tenant: NewTenant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(courier_lane, "TIDIED_MAX", 3)
    tenant = await new_tenant()
    webhook_id = (await service.create(tenant, URL)).webhook_id
    await deliver(pool, tenant, webhook_id, 8)
    turns = []
    async with Sender(settings) as sender:
        for _ in range(3):
            await LaneRunner(pool, sender, settings).serve(await leased(pool, tenant, webhook_id))
            async with pool.tenant(tenant) as tx:
                due_in = await tx.fetchval("SELECT due_at - now() FROM webhook_lanes WHERE webhook_id = $1", webhook_id)
            turns.append((len(await queued(service, tenant, webhook_id)), due_in < dt.timedelta(seconds=10)))
    assert turns == [(5, True), (2, True), (0, False)]
