"""What one client cannot take from all others: the loop, the connections, the database pool."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import JobRequested, TenantTier
from settler_streams.gateway import connections, health
from settler_streams.gateway.bodies import MODEL_BODY_BYTES_MAX, read_event, read_model
from settler_streams.gateway.controls import FlagChange
from settler_streams.services import Scope, api_keys
from tests.gateway.gateways import keyed
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services


@pytest.mark.parametrize("rows", ["1," * 480_000 + "1", "[]," * 300_000 + "[]", '{"":1},' * 130_000 + "{}"])
def test_a_body_of_nothing_but_mistakes_is_refused_at_the_first(rows: str) -> None:
    body = f'{{"left":{{"source":"inline","rows":[{rows}]}},"right":{{"source":"inline","rows":[]}},"rules":{{}}}}'
    with pytest.raises(InvalidRequestError) as refused:
        read_event(JobRequested, body.encode())
    assert "rows[0]" in str(refused.value)
    assert ";" not in str(refused.value)


def test_a_model_has_a_bounded_body() -> None:
    with pytest.raises(InvalidRequestError, match="bytes"):
        read_model(FlagChange, b"{" + b" " * MODEL_BODY_BYTES_MAX + b"}")


async def test_results_since_before_there_was_time(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        for since in ("1969-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
            async with tenant.http.stream("GET", "/v1/results", params={"since": since}) as stream:
                assert stream.status_code == 200


async def test_a_head_that_does_not_come_costs_the_connection(
    gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_DEADLINE_S", 1.0)  # also for a head that does come
    host, port = gateway_url.removeprefix("http://").split(":")
    whole = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    for before, sent in ((b"", b""), (b"", whole[:20]), (whole, b"GET ")):
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(60):
            if before:
                writer.write(before)
                assert (await reader.readuntil(b'{"status":"live"}')).startswith(b"HTTP/1.1 200")
            writer.write(sent)
            assert await reader.read() == b""  # ends when the gateway closes
        writer.close()


async def test_a_flood_of_unknown_keys_leaves_known_ones_their_connections(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "STRANGERS_WAITING_MAX", 3)
    tenant = (await platform.new_tenant(TenantTier.STARTER)).tenant
    issued = await platform.tenants.issue_api_key(tenant.id, tuple(Scope))
    keys = api_keys.ApiKeys(platform.pool)
    assert (await keys.authenticate(issued.key)).tenant_id == tenant.id
    async with platform.pool.tenant(tenant.id), keys._strangers, keys._strangers:  # both look-ups are under way
        flood = [asyncio.create_task(keys.authenticate(issued.key[:-4] + f"{n:04}")) for n in range(4)]
        async with asyncio.timeout(60):
            with pytest.raises(UnavailableError):
                await flood[3]
            assert (await keys.authenticate(issued.key)).tenant_id == tenant.id
    answers = await asyncio.gather(*flood[:3], return_exceptions=True)
    assert [type(answer) for answer in answers] == [api_keys.AuthenticationError] * 3


async def test_readiness_asked_many_times_at_once_asks_the_database_once() -> None:
    asked, release = [], asyncio.Event()

    @contextlib.asynccontextmanager
    async def platform() -> AsyncIterator[SimpleNamespace]:
        asked.append(1)
        await release.wait()
        yield SimpleNamespace(fetchval=AsyncMock())

    gateway: Any = SimpleNamespace(pool=SimpleNamespace(platform=platform), database_probe=None)
    askers = [asyncio.create_task(health._database_answers(gateway)) for _ in range(50)]
    await asyncio.sleep(0)
    askers[0].cancel()
    release.set()
    answers = await asyncio.gather(*askers, return_exceptions=True)
    assert answers[1:] == [True] * 49
    assert len(asked) == 1
    assert await health._database_answers(gateway)
    assert len(asked) == 2, "an answer is not kept"
