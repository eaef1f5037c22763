"""Gateways for tests: real ones, in this process, on a free port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from unittest import mock

import httpx
import pytest_asyncio

from settler_streams.adapters.valkey import rate_limit
from settler_streams.events import TenantTier
from settler_streams.gateway import jobs, serve
from settler_streams.gateway.serve import bind
from settler_streams.ids import TenantId
from settler_streams.services import Scope
from settler_streams.settings import Settings
from tests.services_layer.platform import Platform

JOB = {
    "left": {"source": "inline", "rows": [{"reference": "a", "amount": "1.00"}]},
    "right": {"source": "inline", "rows": [{"reference": "a", "amount": "1.00"}]},
    "rules": {},
}
"""A valid request."""


ANSWERED_WITHIN_S = 25.0
"""Within the deadline of a request. On a busy machine two seconds may pass before admission has answered, after which a
client is told to ask later, and one before Valkey has, after which a gateway decides alone. These tests look at both.
"""


@contextlib.asynccontextmanager
async def running_gateway(
    settings: Settings, drain_s: float = 0.0, port: int = 0
) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A gateway's address, and the event that stops it."""
    listener = bind("127.0.0.1", port)
    url = "http://{}:{}".format(*listener.getsockname())
    stop = asyncio.Event()
    with (
        mock.patch.object(jobs, "DECISION_WITHIN_S", ANSWERED_WITHIN_S),
        mock.patch.object(rate_limit, "ANSWER_DEADLINE_S", ANSWERED_WITHIN_S),
    ):
        serving = asyncio.create_task(serve(settings, listener=listener, stop=stop, drain_s=drain_s))
        try:
            async with httpx.AsyncClient(timeout=90) as client:
                # The socket listens already; the answer comes once the gateway is open.
                asked = asyncio.create_task(_ready(client, url))
                await asyncio.wait([asked, serving], return_when=asyncio.FIRST_COMPLETED)
                if serving.done():
                    asked.cancel()
                    await serving
                await asked
            yield url, stop
        finally:
            stop.set()
            async with asyncio.timeout(60):
                await serving


async def _ready(client: httpx.AsyncClient, url: str) -> None:
    """Ask until it says so. A busy machine's database may be too slow for a balancer's patience, once or twice."""
    async with asyncio.timeout(90):
        while (answer := await client.get(f"{url}/readyz")).status_code == 503:
            assert answer.json()["missing"] == ["database"], answer.text
    assert answer.json() == {"status": "ready"}


@pytest_asyncio.fixture(scope="module")
async def gateway_url(platform: Platform) -> AsyncIterator[str]:
    async with running_gateway(platform.settings) as (url, _stop):
        yield url


@dataclass
class Keyed:
    """A tenant and an HTTP client with its key."""

    id: TenantId
    key: str
    http: httpx.AsyncClient


@contextlib.asynccontextmanager
async def keyed(
    platform: Platform,
    url: str,
    tier: TenantTier = TenantTier.STARTER,
    *,
    scopes: object = tuple(Scope),
    **more: object,
) -> AsyncIterator[Keyed]:
    """A new tenant that speaks to the gateway."""
    tenant = (await platform.new_tenant(tier, **more)).tenant
    issued = await platform.tenants.issue_api_key(tenant.id, scopes)  # type: ignore[arg-type]
    headers = {"Authorization": f"Bearer {issued.key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
        yield Keyed(tenant.id, issued.key, http)
