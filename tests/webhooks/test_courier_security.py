"""Where a courier connects to, and what it signs with."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trustme
from pydantic import SecretStr

from settler_streams.courier import sender
from settler_streams.courier.sender import ForbiddenAddressError, GuardedBackend
from settler_streams.services.webhooks import Rules, WebhookService
from tests.webhooks.conftest import KEY
from tests.webhooks.deliveries import courier, ended, finished, queue
from tests.webhooks.endpoint import listening, status

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("in_a_hurry")]


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
