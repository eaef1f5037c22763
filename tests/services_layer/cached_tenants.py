"""What the tests of the tenant cache share: tenants as rows, directories that hear of changes when a test says so."""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.events import TenantChanged, TenantStatus, TenantTier, envelope
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import TenantConfigurations, TenantDirectory, queries
from settler_streams.services.tenant_store import VALUE_FORMAT
from settler_streams.settings import Settings


class HandFedDirectory(TenantDirectory):
    """The directory, without its feed: :meth:`hear` hands an event over, ``deaf`` is a feed that is stale."""

    deaf = False

    @property
    def stale(self) -> bool:
        return self.deaf

    def hear(self, tenant_id: TenantId, version: int, status: TenantStatus = TenantStatus.ACTIVE) -> None:
        changed = TenantChanged(
            version=version, slug="t", tier=TenantTier.STARTER, status=status, root_id=tenant_id, quotas={}
        )
        now = dt.datetime.now(dt.UTC)
        self._changed(envelope(changed, event_id=uuid7(1), source="/test", tenant=tenant_id, time=now))


@dataclass
class Reader:
    """A process that reads tenants: its cache, its directory, and the two together."""

    cache: TenantCache
    directory: HandFedDirectory
    configurations: TenantConfigurations


@asynccontextmanager
async def reader(settings: Settings, pool: TenantConnectionPool) -> AsyncIterator[Reader]:
    cache, directory = TenantCache(settings, value_format=VALUE_FORMAT), HandFedDirectory(settings)
    configurations = TenantConfigurations(pool, cache, directory)
    configurations.start()
    try:
        yield Reader(cache, directory, configurations)
    finally:
        await configurations.stop()
        await cache.close()


def named(version: int) -> str:
    """The name that the row has in this version, so that a mixture of versions would show."""
    return f"as of {version}"


async def insert_tenant(pool: TenantConnectionPool) -> TenantId:
    """A row in version 1, of which nobody has heard."""
    tenant_id = TenantId(uuid7(1_700_000_000_000))
    async with pool.tenant(tenant_id) as tx:
        slug, config = f"t-{secrets.token_hex(8)}", json.dumps({"region": "eu"})
        await tx.execute(
            queries.INSERT_TENANT, tenant_id, None, tenant_id, slug, named(1), "starter", config, '{"storage": 1}'
        )
    return tenant_id


async def change_row(pool: TenantConnectionPool, tenant_id: TenantId) -> int:
    """One version more, of which nobody has heard."""
    async with pool.tenant(tenant_id) as tx:
        version = await tx.fetchval("SELECT version + 1 FROM tenants WHERE id = $1", tenant_id)
        quotas = json.dumps({"storage": version})
        await tx.execute(
            "UPDATE tenants SET version = $2, name = $3, quotas = $4::text::jsonb WHERE id = $1",
            tenant_id, version, named(version), quotas,
        )  # fmt: skip
    return int(version)
