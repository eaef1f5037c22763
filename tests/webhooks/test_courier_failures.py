"""Deliveries to endpoints that fail, hang or are gone, and what that costs the others: nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from settler_streams.adapters.postgres.queries import PROJECT_BATCH
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.courier.lane import Lane, LaneRunner
from settler_streams.courier.sender import Sender
from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.services.webhooks import Destination, WebhookService, queries
from tests.webhooks.deliveries import batch_of, courier, ended, finished, leased, queue, somebody_waits
from tests.webhooks.endpoint import WAIT_S_MAX, Endpoint, cut, endless, hang, listening, status

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("in_a_hurry")]


def ended_as(outcome: str) -> float:
    return METRICS.registry.get_sample_value("settler_webhook_deliveries_total", {"outcome": outcome}) or 0.0


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (status(500), "refused"),
        (status(404), "refused"),
        (status(429), "refused"),
        (hang, "timeout"),
        (cut, "unreachable"),
    ],
    ids=["500", "404", "429", "hang", "cut"],
)
async def test_what_fails_is_sent_again_under_the_same_id(
    pool: TenantConnectionPool,
    settings: Settings,
    service: WebhookService,
    new_tenant: NewTenant,
    answer: Any,
    outcome: str,
) -> None:
    tenant = await new_tenant()
    event = finished(tenant)
    async with listening(answer, answer) as endpoint, courier(pool, settings):
        issued = await service.create(tenant, endpoint.url)
        await queue(pool, event)
        await endpoint.received(1)
        (failed,) = await ended(service, tenant, issued.webhook_id, 1, "pending", until=lambda d: d.attempts > 0)
        requests = await endpoint.received(3)
        (delivery,) = await ended(service, tenant, issued.webhook_id, 1)
    assert failed.last_outcome == outcome
    assert {(request.event_id, request.body) for request in requests} == {(event.event_id, event.body.encode())}
    assert all(request.signed_with(issued.secret) for request in requests)
    assert (delivery.attempts, delivery.last_outcome) == (3, "delivered")
    assert (await service.get(tenant, issued.webhook_id)).failures == 0


async def test_an_endpoint_that_is_gone_disables_its_webhook(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    events = [finished(tenant) for _ in range(6)]
    async with listening(otherwise=status(410)) as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, *events)
        dead = await ended(service, tenant, webhook_id, 6, "dead")
        assert {delivery.last_outcome for delivery in dead} == {"gone"}
        webhook = await service.get(tenant, webhook_id)
        assert (webhook.status, webhook.disabled_reason, webhook.pending) == ("disabled", "gone", 0)
        await queue(pool, finished(tenant))
        assert (await service.get(tenant, webhook_id)).pending == 0
        for refused in (service.deliveries.redrive, service.deliveries.send_test, service.pause):
            with pytest.raises(ConflictError, match="is disabled"):
                await refused(tenant, webhook_id)  # type: ignore[operator]
        endpoint.otherwise = status(200)
        seen = len(endpoint.requests)
        await service.resume(tenant, webhook_id)
        assert len(await service.deliveries.redrive(tenant, webhook_id)) == 6
        await ended(service, tenant, webhook_id, 6)
        again = (await endpoint.received(seen + 6))[seen:]
    assert {request.event_id for request in again} == {event.event_id for event in events}
    async with pool.tenant(tenant) as tx:
        rows = await tx.fetch("SELECT action, actor FROM audit_logs ORDER BY recorded_at, id")
    assert [tuple(row) for row in rows] == [
        ("webhook.created", "platform"), ("webhook.disabled", "courier"), ("webhook.resumed", "platform"),
        ("webhook.redriven", "platform"),
    ]  # fmt: skip


async def test_after_its_period_a_delivery_is_dead_and_can_be_redriven(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    event, brief = finished(tenant), settings.model_copy(update={"webhook_retry_s": 1})
    before = {outcome: ended_as(outcome) for outcome in ("dead", "delivered")}
    async with listening(otherwise=status(503)) as endpoint, courier(pool, brief):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, event)
        (dead,) = await ended(service, tenant, webhook_id, 1, "dead")
        assert dead.attempts == len(endpoint.requests) > 3
        assert (dead.event_id, dead.last_outcome, dead.last_status) == (event.event_id, "refused", 503)
        with pytest.raises(NotFoundError, match="no dead delivery"):
            await service.deliveries.redrive(tenant, webhook_id, [event.event_id, finished(tenant).event_id])
        endpoint.otherwise = status(204)
        assert await service.deliveries.redrive(tenant, webhook_id, [event.event_id]) == [event.event_id]
        (delivery,) = await ended(service, tenant, webhook_id, 1)
    assert (delivery.attempts, delivery.last_status) == (1, 204)
    assert {outcome: ended_as(outcome) - count for outcome, count in before.items()} == {"dead": 1, "delivered": 1}
    assert {request.event_id for request in endpoint.requests} == {event.event_id}


async def test_what_waited_for_an_endpoint_that_never_came_back_is_dead_too(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    brief = settings.model_copy(update={"webhook_retry_s": 1})
    async with listening(otherwise=cut) as endpoint, courier(pool, brief):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, *(finished(tenant) for _ in range(200)))
        dead = await ended(service, tenant, webhook_id, 200, "dead")
    assert sum(delivery.attempts for delivery in dead) == len(endpoint.requests)
    assert endpoint.in_flight_max <= 4


async def test_an_endpoint_is_left_alone_for_as_long_as_it_asks(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening(status(429, retry_after="2")) as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, finished(tenant))
        (failed,) = await ended(service, tenant, webhook_id, 1, "pending", until=lambda d: d.attempts > 0)
        await queue(pool, finished(tenant))  # the other one waits as well
        assert failed.last_attempt_at is not None
        assert 2 <= (failed.next_attempt_at - failed.last_attempt_at).total_seconds() < 2.1
        for delivery in await ended(service, tenant, webhook_id, 2):
            assert delivery.last_attempt_at is not None
            assert delivery.last_attempt_at >= failed.next_attempt_at


async def test_a_tenants_hanging_endpoints_do_not_hold_up_another_tenant(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    """Eight webhooks of one tenant hang, with room for six turns in all: two of those are never its."""
    slow, quick = await new_tenant(), await new_tenant()
    small = settings.model_copy(update={"webhook_lanes": 6, "webhook_timeout_s": 30})
    async with listening(otherwise=hang) as hanging, listening() as endpoint, courier(pool, small):
        for _ in range(8):
            await service.create(slow, hanging.url)
        issued = await service.create(quick, endpoint.url)
        await queue(pool, *(finished(slow) for _ in range(20)))
        await hanging.received(16)
        await queue(pool, *(finished(quick) for _ in range(40)))
        await ended(service, quick, issued.webhook_id, 40)
        assert (hanging.in_flight, len(hanging.requests)) == (16, 16), "four webhooks, four requests each"
        hanging.released.set()


async def test_an_endpoint_that_fails_is_asked_by_one_request_at_a_time(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant, at_once = await new_tenant(), []

    async def refuse(endpoint: Endpoint, writer: asyncio.StreamWriter) -> None:
        await service.list(tenant)  # for as long as this takes, others could arrive
        at_once.append(endpoint.in_flight)
        await status(500)(endpoint, writer)

    async with listening(*[refuse] * 12) as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, *(finished(tenant) for _ in range(30)))
        await ended(service, tenant, webhook_id, 30)
    assert len(endpoint.requests) == 42
    assert max(at_once[:4]) > 1, "this would notice"
    assert at_once[4:] == [1] * 8


async def test_whatever_one_webhook_meets_does_not_end_the_courier(
    pool: TenantConnectionPool,
    settings: Settings,
    service: WebhookService,
    new_tenant: NewTenant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlucky, lucky = await new_tenant(), await new_tenant()
    send = Sender.send

    async def sometimes(self: Sender, destination: Destination, headers: dict[str, str], body: bytes) -> Any:
        if destination.host == "broken.example":
            raise ZeroDivisionError
        return await send(self, destination, headers, body)

    monkeypatch.setattr(Sender, "send", sometimes)
    async with listening() as endpoint, courier(pool, settings):
        broken = (await service.create(unlucky, "https://broken.example/")).webhook_id
        webhook_id = (await service.create(lucky, endpoint.url)).webhook_id
        await queue(pool, finished(unlucky), finished(lucky))
        async with asyncio.timeout(WAIT_S_MAX), pool.courier() as tx:
            while not await tx.fetchval("SELECT leased_until > now() FROM webhook_lanes WHERE webhook_id = $1", broken):
                pass
        for count in range(2, 5):
            await ended(service, lucky, webhook_id, count - 1)
            await queue(pool, finished(lucky))
    assert [d.attempts for d in await service.deliveries.recent(unlucky, broken)] == [0]


async def test_an_answer_without_end_is_an_answer(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening(otherwise=endless) as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, finished(tenant))
        (delivery,) = await ended(service, tenant, webhook_id, 1)
    assert (delivery.attempts, delivery.last_status) == (1, 200)


async def test_a_webhook_is_removed_while_a_courier_ends_its_turn_without_a_deadlock(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    lane = await leased(pool, tenant, (await service.create(tenant, "https://hooks.example/")).webhook_id)
    async with Sender(settings) as sender:
        runner = LaneRunner(pool, sender, settings)
        async with pool.tenant(tenant) as tx:
            await tx.execute("DELETE FROM webhooks WHERE tenant_id = $1 AND id = $2", tenant, lane.webhook_id)
            turn = asyncio.create_task(runner.serve(lane))
            await somebody_waits(pool)
            await tx.execute(queries.DELETE_LANE, tenant, lane.webhook_id)
        async with asyncio.timeout(WAIT_S_MAX):
            await turn
    assert await service.list(tenant) == []


async def drive_again(service: WebhookService, lane: Lane) -> None:
    assert await service.deliveries.redrive(lane.tenant_id, lane.webhook_id)


@pytest.mark.parametrize("meets", ["a redrive", "a turn that ends"])
async def test_an_event_that_is_read_again_is_queued_beside_whoever_has_its_delivery(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant, meets: str
) -> None:
    tenant = await new_tenant()
    webhook_id = (await service.create(tenant, "https://hooks.example/")).webhook_id
    lane, event = await leased(pool, tenant, webhook_id), finished(tenant)
    await queue(pool, event)
    async with pool.tenant(tenant) as tx:
        await tx.execute("UPDATE webhook_deliveries SET status = 'dead', finished_at = now() - interval '31 days'")
    async with Sender(settings) as sender:
        async with pool.tenant(tenant) as recorder:
            await recorder.execute(queries.HOLD_LANE, tenant, webhook_id)  # as its statement does first
            if meets == "a redrive":
                meeting = asyncio.create_task(drive_again(service, lane))
            else:
                meeting = asyncio.create_task(LaneRunner(pool, sender, settings).serve(lane))
            await somebody_waits(pool)
            await recorder.execute(PROJECT_BATCH, batch_of(event))
        async with asyncio.timeout(WAIT_S_MAX):
            await meeting
    left = [delivery.status for delivery in await service.deliveries.recent(tenant, webhook_id)]
    assert left == (["pending"] if meets == "a redrive" else []), "a turn that ends tidies up"
