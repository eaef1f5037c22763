"""What stands in front of the routes: keys, scopes, the rate limit, draining, metrics, the document."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import uuid

import httpx
import pytest

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.telemetry.tenant_labels import TenantLabels
from settler_streams.dev.stack import ports
from settler_streams.errors import ConfigurationError
from settler_streams.events import QuotaType, TenantTier
from settler_streams.gateway import middleware
from settler_streams.gateway.app import OPERATIONS
from settler_streams.gateway.bodies import event_id_of
from settler_streams.gateway.results import STREAMS_PER_TENANT_MAX
from settler_streams.gateway.serve import bind
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import Scope
from tests.gateway.gateways import JOB, keyed, running_gateway
from tests.services.interface import Service
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services


async def test_only_a_key_names_the_tenant(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant, keyed(platform, gateway_url) as other:
        path = f"/v1/jobs/{uuid.uuid4()}"
        for wrong in ("", "Bearer", "Bearer x", f"Basic {tenant.key}", f"Bearer {tenant.key}x"):
            refused = await tenant.http.get(path, headers={"Authorization": wrong})
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        assert (await tenant.http.get(path, headers={"X-Tenant-ID": other.id})).status_code == 403
        assert (await tenant.http.get(path, headers={"X-Tenant-ID": tenant.id})).status_code == 404
        assert (await tenant.http.get("/v1/nowhere")).status_code == 404
        assert (await tenant.http.patch("/v1/jobs")).status_code == 405


async def test_a_key_does_only_what_its_scopes_say(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url, scopes=[Scope.JOBS_READ]) as tenant:
        assert (await tenant.http.get(f"/v1/jobs/{uuid.uuid4()}")).status_code == 404
        assert (await tenant.http.post("/v1/jobs", json=JOB)).status_code == 403
        assert (await tenant.http.put("/v1/flags/f", json={})).status_code == 403
        assert (await tenant.http.get("/v1/flags/f")).status_code == 403
        assert (await tenant.http.post("/v1/usage", json={})).status_code == 403


async def test_the_http_policy_refuses_with_headers(platform: Platform, gateway_url: str) -> None:
    path = f"/v1/jobs/{uuid.uuid4()}"
    async with keyed(platform, gateway_url, TenantTier.FREE, quotas={QuotaType.RATE_LIMIT: 1}) as tenant:
        allowed = [await tenant.http.get(path) for _ in range(10)]  # ten at once, then ten a minute
        assert {a.status_code for a in allowed} == {404}
        assert allowed[0].headers["ratelimit-policy"] == '"http";q=10;w=60'
        assert allowed[0].headers["ratelimit"] == '"http";r=9'
        async with asyncio.timeout(60):
            while (refused := await tenant.http.get(path)).status_code == 404:
                pass  # a slow machine earns a token in between
        assert refused.status_code == 429
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["violated-policies"] == ["http"]
        wait_s = int(refused.headers["retry-after"])
        assert 1 <= wait_s <= 6
        assert refused.headers["ratelimit"] == f'"http";r=0;t={wait_s}'
    async with keyed(platform, gateway_url, TenantTier.ENTERPRISE) as enterprise:
        assert "ratelimit" not in (await enterprise.http.get(path)).headers


async def test_without_valkey_requests_go_on_within_a_share(platform: Platform, valkey: Service) -> None:
    async with running_gateway(platform.settings) as (url, _), keyed(platform, url, TenantTier.SCALE) as tenant:
        path = f"/v1/jobs/{uuid.uuid4()}"
        assert (await tenant.http.get(path)).status_code == 404
        valkey.stop()
        try:
            # A share starts empty: 60000 a minute over 16 gateways earn a token every 16 ms.
            first = await tenant.http.get(path)
            async with asyncio.timeout(60):
                while (await tenant.http.get(path)).status_code != 404:
                    pass
        finally:
            valkey.start()
        assert first.status_code == 429


async def test_draining_says_not_ready_and_still_serves(platform: Platform) -> None:
    async with (
        running_gateway(platform.settings, drain_s=8) as (url, stop),
        keyed(platform, url) as tenant,
        tenant.http.stream("GET", "/v1/results") as stream,
    ):
        lines = stream.aiter_lines()
        assert (await anext(lines)).startswith("id: ")
        stop.set()
        async for _ in lines:  # ends: the gateway closes its event streams
            pass
        response = await tenant.http.get("/readyz")
        assert (response.status_code, response.json()["missing"]) == (503, ["draining"])
        assert (await tenant.http.get("/livez")).status_code == 200
        assert (await tenant.http.post("/v1/jobs", json=JOB)).status_code == 202


async def test_metrics_count_requests_and_hide_from_the_public(
    platform: Platform, gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests of this process have tenants, too, and only so many get a label.
    monkeypatch.setattr(METRICS, "_active", TenantLabels(METRICS._forget_active))
    async with keyed(platform, gateway_url) as tenant, httpx.AsyncClient(base_url=gateway_url) as public:
        await tenant.http.get(f"/v1/jobs/{uuid.uuid4()}")
        await public.get("/v1/made/up")
        text = (await public.get("/metrics")).text
        assert f'http_requests_total{{status="404",tenant="{tenant.id}"}} 1.0' in text
        assert re.search(r'http_requests_total{status="401",tenant="[^"]*"}', text)
        assert re.search(r'http_request_duration_seconds_bucket{[^}]*route="/v1/jobs/{job_id}"', text)
        assert (await public.get("/metrics", headers={"X-Forwarded-For": "8.8.8.8"})).status_code == 404


async def test_the_document_names_every_operation(gateway_url: str) -> None:
    async with httpx.AsyncClient(base_url=gateway_url) as public:
        document = (await public.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == {(operation.method, operation.path) for operation in OPERATIONS}
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references <= set(document["components"]["schemas"])
    assert "JobRequested" in references


def test_an_idempotency_key_gives_one_id_per_tenant() -> None:
    one, two = TenantId(uuid7(1)), TenantId(uuid7(2))
    assert event_id_of(one, "k") == event_id_of(one, "k")
    assert event_id_of(one, "k") != event_id_of(two, "k")
    given = uuid7(1_700_000_000_000)
    assert event_id_of(one, given) == given
    for derived in (given.upper(), str(uuid.uuid4()), given.replace("-", "")):
        assert event_id_of(one, derived) != event_id_of(two, derived)


async def test_a_tenant_opens_a_bounded_number_of_streams(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant, contextlib.AsyncExitStack() as stack:
        for _ in range(STREAMS_PER_TENANT_MAX):
            stream = await stack.enter_async_context(tenant.http.stream("GET", "/v1/results"))
            assert stream.status_code == 200
        assert (await tenant.http.get("/v1/results")).status_code == 503


async def test_a_body_that_does_not_come_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "REQUEST_DEADLINE_S", 0.05)
    sent: list[dict[str, object]] = []

    async def never_reached(*_: object) -> None:
        raise AssertionError("the application saw half a body")

    async def receive() -> dict[str, object]:
        if not sent_chunk:
            sent_chunk.append(True)
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    sent_chunk: list[bool] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": []}
    await middleware.BoundsMiddleware(never_reached)(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 503


async def test_a_child_draws_on_its_parents_rate(platform: Platform, gateway_url: str) -> None:
    parent = (await platform.new_tenant(TenantTier.FREE, quotas={QuotaType.RATE_LIMIT: 1})).tenant
    async with (
        keyed(platform, gateway_url, parent_id=parent.id) as one,
        keyed(platform, gateway_url, parent_id=parent.id) as two,
    ):
        path = f"/v1/jobs/{uuid.uuid4()}"
        spent = [(await child.http.get(path)).status_code for child in (one, two) * 5]
        assert spent == [404] * 10
        async with asyncio.timeout(60):
            while (refused := await two.http.get(path)).status_code == 404:
                pass  # a slow machine earns a token in between
        assert refused.status_code == 429
        assert refused.headers["ratelimit-policy"] == '"http";q=10;w=60'
        assert 1 <= int(refused.headers["retry-after"]) <= 6


async def test_a_process_drains_on_the_first_signal_and_exits_clean(platform: Platform) -> None:
    port = ports.free_port()
    settings = platform.settings.model_copy(update={"gateway_port": port})
    program = (
        "import asyncio; from settler_streams.gateway import serve; from settler_streams.settings import Settings;"
        "asyncio.run(serve(Settings.from_environment(), drain_s=0.2))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env={**os.environ, **settings.environment()}, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(90):
            async for line in process.stdout:
                if b"gateway ready" in line:
                    break
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"http://127.0.0.1:{port}/livez", timeout=30)).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_answers_do_not_wait_for_delayed_acknowledgements() -> None:
    listener = bind("127.0.0.1", 0)
    found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def accepted(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async with await asyncio.start_server(accepted, sock=listener):
        _reader, writer = await asyncio.open_connection(*listener.getsockname())
        async with asyncio.timeout(60):
            assert await found != 0
        writer.close()


def test_a_taken_address_is_a_configuration_error() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigurationError):
        bind("127.0.0.1", first.getsockname()[1])
