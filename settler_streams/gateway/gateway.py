"""The gateway's parts, opened and closed together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.valkey.rate_limit import ValkeyRateLimiter
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.gateway.decisions import JobDecisions
from settler_streams.services import (
    ApiKeys,
    EventPublisher,
    FeatureFlagService,
    OutboxRelay,
    PrioritizedQueue,
    QuotaService,
    RetentionService,
    RetentionSweeper,
    TenantConfigurations,
    TenantDirectory,
)
from settler_streams.services.tenant_store import VALUE_FORMAT
from settler_streams.settings import Settings
from settler_streams.tiers import Tiers, load_tiers

SOURCE = "/gateway"
"""One source for all gateways: a job submitted again through another one is still the same job."""


@dataclass
class Gateway:
    """What the routes work with. ``draining`` is set once the process has been told to stop."""

    settings: Settings
    tiers: Tiers
    pool: TenantConnectionPool
    publisher: EventPublisher
    directory: TenantDirectory
    flags: FeatureFlagService
    decisions: JobDecisions
    relay: OutboxRelay
    limiter: ValkeyRateLimiter
    api_keys: ApiKeys
    queue: PrioritizedQueue
    quotas: QuotaService
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    streams: dict[str, int] = field(default_factory=dict)
    """Open event streams per tenant."""
    database_probe: asyncio.Task[bool] | None = None
    """The newest question to the database whether it answers; those who ask meanwhile share it."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Gateway]:
        """Connect to Postgres and Kafka and load what is kept in memory. Valkey may be down.

        Raises:
            UnavailableError: Postgres or Kafka did not answer in time.
            ConfigurationError: the database login could bypass row-level security.
        """
        async with AsyncExitStack() as stack:
            pool = await TenantConnectionPool.open(settings)
            stack.push_async_callback(pool.close)
            limiter = ValkeyRateLimiter(settings, "http")
            stack.push_async_callback(limiter.close)
            cache = TenantCache(settings, value_format=VALUE_FORMAT)
            stack.push_async_callback(cache.close)
            publisher = EventPublisher(settings, source=SOURCE)
            directory = TenantDirectory(settings)
            flags = FeatureFlagService(settings, directory, publisher)
            decisions = JobDecisions(settings)
            # Events that a process left in the outbox when it died are published by whoever runs.
            relay = OutboxRelay(pool, publisher)
            await publisher.start()
            stack.push_async_callback(publisher.stop)
            sweeper = RetentionSweeper(RetentionService(pool), directory)
            for part in (directory.feed, flags.feed, decisions.feed, relay, sweeper):
                await part.start()
                stack.push_async_callback(part.stop)
            configurations, tiers = TenantConfigurations(pool, cache, directory), load_tiers()
            configurations.start()
            stack.push_async_callback(configurations.stop)
            yield cls(
                settings=settings,
                tiers=tiers,
                pool=pool,
                publisher=publisher,
                directory=directory,
                flags=flags,
                decisions=decisions,
                relay=relay,
                limiter=limiter,
                api_keys=ApiKeys(pool),
                queue=PrioritizedQueue(publisher, directory),
                quotas=QuotaService(pool, tiers=tiers, configurations=configurations),
            )
