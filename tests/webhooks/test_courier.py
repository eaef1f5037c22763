"""Deliveries to endpoints that behave: what is sent to whom, once, and when."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest

from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.events import decode
from settler_streams.services.webhooks import WebhookService
from tests.webhooks.deliveries import courier, ended, finished, queue
from tests.webhooks.endpoint import hang, listening

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("in_a_hurry")]


async def test_an_event_arrives_as_it_was_and_signed(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    event = finished(tenant)
    async with listening() as endpoint, courier(pool, settings):
        issued = await service.create(tenant, endpoint.url)
        await queue(pool, event)
        (request,) = await endpoint.received(1)
        (delivery,) = await ended(service, tenant, issued.webhook_id, 1)
    assert request.body == event.body.encode()
    assert decode(request.body).id == request.event_id == delivery.event_id == event.event_id
    assert request.path == "/hook?to=us"
    assert request.headers["content-type"].startswith("application/cloudevents+json")
    assert request.headers["host"] == f"127.0.0.1:{endpoint.port}"
    assert request.signed_with(issued.secret)
    assert not request.signed_with("whsec_" + "A" * 43 + "=")
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 60
    assert (delivery.attempts, delivery.last_outcome, delivery.last_status) == (1, "delivered", 200)


async def test_several_couriers_share_the_work_and_send_each_event_once(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenants = [await new_tenant() for _ in range(6)]
    async with listening() as endpoint, courier(pool, settings), courier(pool, settings), courier(pool, settings):
        webhooks = [(tenant, (await service.create(tenant, endpoint.url)).webhook_id) for tenant in tenants]
        for _ in range(5):
            await queue(pool, *(finished(tenant) for tenant in tenants for _ in range(10)))
        for tenant, webhook_id in webhooks:
            await ended(service, tenant, webhook_id, 50)
    sent = [request.event_id for request in endpoint.requests]
    assert len(sent) == len(set(sent)) == 300


async def test_a_paused_webhook_queues_and_sends_later(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening() as endpoint, courier(pool, settings):
        paused, active = [(await service.create(tenant, endpoint.url)).webhook_id for _ in range(2)]
        await service.pause(tenant, paused)
        events = [finished(tenant) for _ in range(3)]
        await queue(pool, *events)
        await ended(service, tenant, active, 3)
        webhook = await service.get(tenant, paused)
        assert (webhook.status, webhook.pending) == ("paused", 3)
        await service.resume(tenant, paused)
        await ended(service, tenant, paused, 3)
    assert sorted(request.event_id for request in endpoint.requests) == sorted(2 * [e.event_id for e in events])


async def test_a_test_goes_to_its_webhook_alone_and_whatever_it_wants(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening() as tested, listening() as other:
        issued = await service.create(tenant, tested.url, ["settler.quota.threshold.v1"])
        await service.create(tenant, other.url)
        event_id = await service.deliveries.send_test(tenant, issued.webhook_id)
        with pytest.raises(ConflictError, match="still under way"):
            await service.deliveries.send_test(tenant, issued.webhook_id)
        async with courier(pool, settings):
            (request,) = await tested.received(1)
            await ended(service, tenant, issued.webhook_id, 1)
            assert (await service.deliveries.get(tenant, issued.webhook_id, event_id)).status == "delivered"
        assert other.connections == 0
    event = json.loads(request.body)
    assert (event["type"], event["id"], event["tenantid"]) == ("settler.webhook.test.v1", event_id, tenant)
    assert event["data"] == {"webhook_id": issued.webhook_id}
    assert request.signed_with(issued.secret)


async def test_a_webhook_that_is_removed_while_it_is_served_takes_its_deliveries_with_it(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    patient = settings.model_copy(update={"webhook_timeout_s": 30})
    async with listening(otherwise=hang) as endpoint, listening() as other, courier(pool, patient):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, *(finished(tenant) for _ in range(9)))
        await endpoint.received(4)
        await service.delete(tenant, webhook_id)
        endpoint.released.set()
        kept = (await service.create(tenant, other.url)).webhook_id
        await queue(pool, finished(tenant))
        await ended(service, tenant, kept, 1)
        assert len(endpoint.requests) == 4
    async with pool.tenant(tenant) as tx:
        assert await tx.fetchval("SELECT count(*) FROM webhook_deliveries WHERE webhook_id = $1", webhook_id) == 0


async def test_deliveries_are_their_tenants_alone(
    pool: TenantConnectionPool, service: WebhookService, new_tenant: NewTenant
) -> None:
    mine, theirs = await new_tenant(), await new_tenant()
    webhook_id = (await service.create(theirs, "https://hooks.example/")).webhook_id
    event = finished(theirs)
    await queue(pool, event)
    assert [d.event_id for d in await service.deliveries.recent(theirs, webhook_id)] == [event.event_id]
    for attempt in (service.deliveries.recent, service.deliveries.redrive, service.deliveries.send_test):
        with pytest.raises(NotFoundError, match="has no webhook"):
            await attempt(mine, webhook_id)  # type: ignore[operator]
    with pytest.raises(NotFoundError, match="has no delivery"):
        await service.deliveries.get(mine, webhook_id, event.event_id)


async def test_events_at_once_and_wherever_the_courier_is_are_all_delivered(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    """A lane that is being given back while something is queued for it must not fall asleep over it."""
    tenant = await new_tenant()
    async with listening() as endpoint, courier(pool, settings), courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        for _ in range(40):
            await asyncio.gather(*(queue(pool, finished(tenant)) for _ in range(3)))
        await ended(service, tenant, webhook_id, 120)
    assert len(endpoint.requests) == 120
