"""Deliveries to endpoints that behave and to others that do not."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from pydantic import SecretStr

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.core import webhooks as decisions
from settler_streams.courier import process, sender
from settler_streams.courier.sender import ForbiddenAddressError, GuardedBackend, Sender
from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.events import decode
from settler_streams.services.webhooks import Destination, Rules, WebhookService
from tests.webhooks.conftest import KEY
from tests.webhooks.deliveries import courier, ended, finished, queue
from tests.webhooks.endpoint import WAIT_S_MAX, Endpoint, cut, endless, hang, listening, status

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become hundredths; nothing else changes."""
    monkeypatch.setattr(decisions, "BACKOFF_MIN_S", 0.05)
    monkeypatch.setattr(decisions, "LANE_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(process, "POLL_S", 0.02)


def ended_as(outcome: str) -> float:
    return METRICS.registry.get_sample_value("settler_webhook_deliveries_total", {"outcome": outcome}) or 0.0


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


async def test_both_secrets_sign_until_the_overlap_ends(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening() as endpoint, courier(pool, settings):
        first = await service.create(tenant, endpoint.url)
        second = await service.rotate_secret(tenant, first.webhook_id)
        await queue(pool, finished(tenant))
        (during,) = await endpoint.received(1)
        third = await service.rotate_secret(tenant, first.webhook_id, overlap_s=0)
        await ended(service, tenant, first.webhook_id, 1)
        await queue(pool, finished(tenant))
        (_, after) = await endpoint.received(2)
        await ended(service, tenant, first.webhook_id, 2)
    secrets = (first.secret, second.secret, third.secret)
    assert [during.signed_with(one) for one in secrets] == [True, True, False]
    assert [after.signed_with(one) for one in secrets] == [False, False, True]
    async with pool.tenant(tenant) as tx:
        assert await tx.fetchval("SELECT previous_secret_encrypted FROM webhooks") is None, "what is over is forgotten"


async def test_a_secret_whose_overlap_is_over_does_not_sign_even_before_it_is_forgotten(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening() as endpoint:
        first = await service.create(tenant, endpoint.url)
        second = await service.rotate_secret(tenant, first.webhook_id, overlap_s=0)
        await queue(pool, finished(tenant))
        async with courier(pool, settings):
            (request,) = await endpoint.received(1)
    assert [request.signed_with(one.secret) for one in (first, second)] == [False, True]


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


async def test_no_redirect_is_followed(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening() as inside, listening() as endpoint, courier(pool, settings):
        endpoint.script.append(status(307, location=inside.url))
        issued = await service.create(tenant, endpoint.url)
        await queue(pool, finished(tenant))
        await endpoint.received(2)
        await ended(service, tenant, issued.webhook_id, 1)
        assert inside.connections == 0


async def test_a_name_that_leads_inside_is_not_connected_to(
    pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant
) -> None:
    """The URL looks public enough when the webhook is made; the address is checked when it matters."""
    tenant = await new_tenant()
    strict = settings.model_copy(update={"webhook_allow_private": False, "webhook_allow_http": True})
    service = WebhookService(pool, strict)
    async with listening() as endpoint, courier(pool, strict):
        urls = [
            f"http://localhost:{endpoint.port}/",
            f"http://127.1:{endpoint.port}/",
            f"http://2130706433:{endpoint.port}/",
        ]
        webhooks = [(await service.create(tenant, url)).webhook_id for url in urls]
        await queue(pool, finished(tenant))
        for webhook_id in webhooks:
            (failed,) = await ended(service, tenant, webhook_id, 1, "pending", until=lambda d: d.attempts > 1)
            assert (failed.last_outcome, failed.last_status) == ("forbidden", None)
        assert endpoint.connections == 0


async def test_the_connection_goes_to_the_very_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to a public address when it is checked, and to this machine a moment later."""
    answers = [["93.184.215.14"], ["127.0.0.1"], ["10.0.0.1", "::ffff:127.0.0.1", "fe80::1%1"]]
    connected = []

    async def connect_tcp(host: str, *_: object) -> None:
        connected.append(host)

    monkeypatch.setattr(sender, "_resolve", lambda *_: answers.pop(0))
    backend = GuardedBackend(Rules(allow_http=False, allow_private=False), threads_max=1)
    monkeypatch.setattr(backend._inner, "connect_tcp", connect_tcp)
    await backend.connect_tcp("rebound.example", 443)
    for _ in range(2):
        with pytest.raises(ForbiddenAddressError):
            await backend.connect_tcp("rebound.example", 443)
    assert connected == ["93.184.215.14"]
    assert not answers
    backend.close()


async def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    pool: TenantConnectionPool,
    settings: Settings,
    service: WebhookService,
    new_tenant: NewTenant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tenant = await new_tenant()
    monkeypatch.setattr(sender, "_resolve", lambda *_: ["127.0.0.2", "127.0.0.1"])
    async with listening() as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, finished(tenant))
        (delivery,) = await ended(service, tenant, webhook_id, 1)
    assert delivery.attempts == 1


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


async def test_an_answer_without_end_is_an_answer(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    async with listening(otherwise=endless) as endpoint, courier(pool, settings):
        webhook_id = (await service.create(tenant, endpoint.url)).webhook_id
        await queue(pool, finished(tenant))
        (delivery,) = await ended(service, tenant, webhook_id, 1)
    assert (delivery.attempts, delivery.last_status) == (1, 200)


async def test_tls_is_verified(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant, tmp_path: Path
) -> None:
    tenant = await new_tenant()
    known, unknown = trustme.CA(), trustme.CA()
    known.cert_pem.write_to_path(tmp_path / "ca.pem")
    trusting = settings.model_copy(update={"webhook_ca_file": tmp_path / "ca.pem"})

    def presenting(authority: trustme.CA, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        return context

    async with (
        listening(tls=presenting(known, "localhost")) as good,
        listening(tls=presenting(unknown, "localhost")) as forged,
        listening(tls=presenting(known, "other.example")) as mistaken,
        courier(pool, trusting),
    ):
        ids = [
            (await service.create(tenant, f"https://localhost:{e.port}/")).webhook_id for e in (good, forged, mistaken)
        ]
        await queue(pool, finished(tenant))
        await ended(service, tenant, ids[0], 1)
        for webhook_id in ids[1:]:
            (failed,) = await ended(service, tenant, webhook_id, 1, "pending", until=lambda d: d.attempts > 0)
            assert failed.last_outcome == "unreachable"
        assert [len(endpoint.requests) for endpoint in (good, forged, mistaken)] == [1, 0, 0]


async def test_secrets_are_encrypted_anew_under_a_new_key_and_an_unknown_key_stops_nobody_else(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant, stranger = await new_tenant(), await new_tenant()
    renewed = settings.model_copy(update={"webhook_keys": SecretStr(f"two:{'b2' * 32},one:{KEY}")})
    lost = settings.model_copy(update={"webhook_keys": SecretStr(f"three:{'c3' * 32}")})
    async with listening() as endpoint, courier(pool, renewed):
        await WebhookService(pool, lost).create(stranger, endpoint.url)
        issued = await service.create(tenant, endpoint.url)
        newer = await service.rotate_secret(tenant, issued.webhook_id)
        await queue(pool, finished(stranger), finished(tenant))
        (request,) = await endpoint.received(1)
        await ended(service, tenant, issued.webhook_id, 1)
        async with pool.tenant(tenant) as tx:
            row = await tx.fetchrow("SELECT secret_key_id, previous_secret_key_id FROM webhooks")
        assert tuple(row) == ("two", "two")
        await queue(pool, finished(tenant))
        (_, after) = await endpoint.received(2)
        await ended(service, tenant, issued.webhook_id, 2)
    for sent in (request, after):
        assert sent.signed_with(issued.secret)
        assert sent.signed_with(newer.secret)
    assert await service.deliveries.recent(stranger, (await service.list(stranger))[0].id, status="delivered") == []


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
