"""A small platform for a test module: topics, a migrated database, admission in this process, services over them.

It lives no longer than its module: its folds are members of consumer groups, and between the tests of other modules
nobody would run their event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import pytest_asyncio

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.events import Envelope, Part, TenantTier
from settler_streams.services import (
    Acknowledgements,
    CreatedTenant,
    EventPublisher,
    OutboxRelay,
    TenantDirectory,
    TenantService,
    acknowledgements,
    directory,
)
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from settler_streams.workers.folds import new_app
from tests.services.interface import Service, Services

SETTLED_WITHIN_S = 60.0
"""Bound of every wait for something that happens in the background."""


@dataclass
class Platform:
    """What a test needs."""

    settings: Settings
    pool: TenantConnectionPool
    publisher: EventPublisher
    directory: TenantDirectory
    relay: OutboxRelay
    tenants: TenantService

    async def new_tenant(self, tier: TenantTier = TenantTier.STARTER, **more: object) -> CreatedTenant:
        """A tenant that admission knows."""
        token = secrets.token_hex(6)
        return await self.tenants.create_tenant(
            name=f"Tenant {token}",
            slug=f"t-{token}",
            owner_email=f"owner@{token}.example",
            owner_password_hash="unused",
            tier=tier,
            **more,  # type: ignore[arg-type]
        )


async def settled(feed: TopicFeed, condition: Callable[[], bool]) -> None:
    """Wait until ``condition()`` holds, which can only change with an event of ``feed``."""
    handed_over = asyncio.Event()
    on_event = feed._on_event

    def signalled(event: Envelope[Part]) -> None:
        on_event(event)
        handed_over.set()

    feed._on_event = signalled
    try:
        async with asyncio.timeout(SETTLED_WITHIN_S):
            while not condition():
                handed_over.clear()
                await handed_over.wait()
    finally:
        feed._on_event = on_event


@contextlib.asynccontextmanager
async def running_role(role: str, settings: Settings, pool: TenantConnectionPool | None = None) -> AsyncIterator[None]:
    """A role's folds, in this process."""
    app = new_app(role, settings, load_topology(), pool)
    ticker = asyncio.create_task(app.ticker.run()) if app.ticker is not None else None
    await app.start()
    try:
        yield
    finally:
        if ticker is not None:
            ticker.cancel()
            await asyncio.wait([ticker])
        await app.stop()


@pytest.fixture(scope="module")
def new_settings(services: Services, kafka: Service, postgres: Service, valkey: Service) -> Settings:
    """A deployment and a database of their own."""
    token = secrets.token_hex(4)
    return services.settings.model_copy(update={"deployment": f"t-{token}", "db_name": f"t_{token}"})


@pytest_asyncio.fixture(scope="module")
async def platform(new_settings: Settings) -> AsyncIterator[Platform]:
    await migrate(new_settings)
    async with Cluster.of(new_settings).admin() as client:
        await apply(client, load_topology().declared(new_settings.deployment))
    async with contextlib.AsyncExitStack() as stack:
        # What a caller is told when admission is slow has tests of its own; the others wait for it.
        stack.enter_context(mock.patch.object(acknowledgements, "ACKNOWLEDGED_WITHIN_S", SETTLED_WITHIN_S))
        stack.enter_context(mock.patch.object(directory, "KNOWN_WITHIN_S", SETTLED_WITHIN_S))
        await stack.enter_async_context(running_role("admission", new_settings))
        pool = await TenantConnectionPool.open(new_settings)
        stack.push_async_callback(pool.close)
        publisher = EventPublisher(new_settings, source="/test")
        relay = OutboxRelay(pool, publisher)
        told = Acknowledgements(new_settings)
        known = TenantDirectory(new_settings)
        for part in (publisher, told, known, relay):
            await part.start()
            stack.push_async_callback(part.stop)
        tenants = TenantService(pool, relay, told)
        yield Platform(new_settings, pool, publisher, known, relay, tenants)
