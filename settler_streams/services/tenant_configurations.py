"""Tenants' configuration as a reader wants it: from Valkey when it can be trusted, else from Postgres, which decides.

A read returns no version older than the newest that this process has seen: in a change's event, in a change of its own
that was invalidated here, in a row. What Valkey holds is held against that; what is older is dropped, and Postgres is
asked. While the process may miss changes (its directory's feed is stale) Valkey is not asked at all, so a copy outlives
the change of its tenant by no more than the feed's silence may last, whatever happened to Valkey meanwhile.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
import structlog

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey.tenant_cache import LEASE_S, TTL_MAX_S, TenantCache
from settler_streams.events import QuotaType, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import tenant_store
from settler_streams.services.background import in_background
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.tenant_store import VALUE_FORMAT, Tenant
from settler_streams.settings import Settings

log = structlog.get_logger(__name__)

FLOORS_MAX = 10_000
"""Versions seen that the directory has not heard of yet, which takes milliseconds. Beyond it all of them are forgotten
and Valkey is not asked until everything has expired that could be older."""
INVALIDATIONS_MAX = 10_000
"""Tenants whose change still has to reach Valkey; beyond it the rest is left to the versions that readers compare."""

_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Stored(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tenant in Valkey. Whoever changes a field raises :data:`VALUE_FORMAT`."""

    id: TenantId
    version: Annotated[int, msgspec.Meta(ge=1)]
    slug: str
    name: str
    tier: TenantTier
    status: TenantStatus
    root_id: TenantId
    parent_id: TenantId | None
    quotas: dict[QuotaType, _Count]
    config: dict[str, Any]
    erase_after: dt.datetime | None
    restored_as: TenantStatus | None


_DECODER = msgspec.json.Decoder(_Stored)


class TenantConfigurations:
    """Read-through, one per process. Everything that is waited for is bounded by the pool and the cache."""

    def __init__(
        self,
        pool: TenantConnectionPool,
        cache: TenantCache,
        directory: TenantDirectory,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._cache = cache
        self._directory = directory
        self._clock_s = clock_s
        self._flights: dict[TenantId, asyncio.Task[Tenant]] = {}
        """Reads under way, each begun after the last change of its tenant that was seen here."""
        self._floors: dict[TenantId, int] = {}
        """Versions seen that the directory does not have yet."""
        self._bypass_until_s = 0.0
        self._pending: dict[TenantId, int] = {}
        self._has_pending = asyncio.Event()
        self._invalidating: asyncio.Task[None] | None = None
        self._stopping = False

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings, pool: TenantConnectionPool) -> AsyncIterator[TenantConfigurations]:
        """With a directory and a cache of its own, for a process that has none yet. Valkey may be down.

        Raises:
            UnavailableError: Kafka did not answer in time.
        """
        cache, directory = TenantCache(settings, value_format=VALUE_FORMAT), TenantDirectory(settings)
        try:
            await directory.start()
            configurations = cls(pool, cache, directory)
            configurations.start()
            try:
                yield configurations
            finally:
                await configurations.stop()
        finally:
            await directory.stop()
            await cache.close()

    def start(self) -> None:
        """Pass the directory's changes on to Valkey. Start the directory first, or its past is passed on too."""
        self._directory.follow(self._changed)
        self._invalidating = in_background(self._invalidate_changed(), "invalidation of the tenant cache")

    async def stop(self) -> None:
        """Stop doing so, and end the reads under way."""
        if self._invalidating is None:
            return
        self._directory.unfollow(self._changed)
        self._stopping = True
        ending = [self._invalidating, *self._flights.values()]
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)

    async def read(self, tenant_id: TenantId) -> Tenant:
        """The tenant. Those who ask at the same time share one look-up.

        Raises:
            NotFoundError: there is no such tenant.
            UnavailableError: no connection to Postgres became free in time.
        """
        flight = self._flights.get(tenant_id)
        if flight is None:
            flight = self._flights[tenant_id] = asyncio.create_task(self._look_up(tenant_id))
            flight.add_done_callback(lambda ended: self._landed(tenant_id, ended))
        return await asyncio.shield(flight)  # who gives up leaves it to the others

    async def invalidate(self, tenant_id: TenantId, version: int) -> bool:
        """Nothing older than ``version`` is read here from now on, nor elsewhere when Valkey answers: True."""
        self._seen(tenant_id, version)
        return await self._cache.invalidate(tenant_id, version)

    async def _look_up(self, tenant_id: TenantId) -> Tenant:
        """1. Valkey, where it can be trusted; 2. Postgres; 3. back to Valkey, under the lease that 1. gave."""
        lease = None
        if self._directory.stale or self._clock_s() < self._bypass_until_s:
            METRICS.tenant_cache("bypassed")
        elif self._directory.get(tenant_id) is not None:  # of made-up ids nothing is kept in Valkey
            found = await self._cache.read(tenant_id)
            if found is not None and found.value is not None:
                if (tenant := await self._trusted(tenant_id, found.version, found.value)) is not None:
                    METRICS.tenant_cache("hit")
                    return tenant
            elif found is not None:
                METRICS.tenant_cache("miss")
                lease = found.lease
        tenant = await self._row(tenant_id)
        if tenant.version > self._floor(tenant_id):
            self._raise_floor(tenant_id, tenant.version)
        if lease is not None:
            await self._cache.store(tenant_id, tenant.version, encoded(tenant), lease)
        return tenant

    async def _row(self, tenant_id: TenantId) -> Tenant:
        async with self._pool.tenant(tenant_id) as tx:  # not of a replica, which may lag
            tenant = await tenant_store.read(tx, tenant_id)
            floor = self._floor(tenant_id)
            if tenant.version < floor:  # changed meanwhile, so a second look finds that change
                tenant = await tenant_store.read(tx, tenant_id)
        if tenant.version < floor:
            log.error("a tenant's row is older than its change", tenant=tenant_id, row=tenant.version, change=floor)
        return tenant

    async def _trusted(self, tenant_id: TenantId, version: int, value: bytes) -> Tenant | None:
        """The tenant in a value of Valkey; None, and the value is dropped, when it is no good."""
        tenant = decoded(tenant_id, version, value)
        if tenant is None:
            METRICS.tenant_cache("foreign")
            log.error("tenant cache holds what nobody stored", tenant=tenant_id, size_bytes=len(value))
            await self._cache.discard(tenant_id)
            return None
        floor = self._floor(tenant_id)
        if version < floor:
            METRICS.tenant_cache("outdated")
            await self._cache.invalidate(tenant_id, floor)
            return None
        return tenant

    def _floor(self, tenant_id: TenantId) -> int:
        """The newest version of the tenant that was seen here."""
        known = self._directory.get(tenant_id)
        return max(self._floors.get(tenant_id, 0), known.version if known is not None else 0)

    def _seen(self, tenant_id: TenantId, version: int) -> None:
        """A newer version exists: whoever asks from here on must not be told what an earlier look-up finds."""
        if version > self._floor(tenant_id):
            self._raise_floor(tenant_id, version)
        self._flights.pop(tenant_id, None)

    def _raise_floor(self, tenant_id: TenantId, version: int) -> None:
        if len(self._floors) >= FLOORS_MAX and tenant_id not in self._floors:
            self._floors.clear()
            self._bypass_until_s = self._clock_s() + TTL_MAX_S + LEASE_S
        self._floors[tenant_id] = version

    def _changed(self, tenant_id: TenantId, version: int) -> None:
        if self._floors.get(tenant_id, 0) <= version:
            self._floors.pop(tenant_id, None)
        self._flights.pop(tenant_id, None)
        if tenant_id in self._pending or len(self._pending) < INVALIDATIONS_MAX:
            self._pending[tenant_id] = version
            self._has_pending.set()

    async def _invalidate_changed(self) -> None:
        """Tell Valkey of each change, once. When it does not answer, readers find the copy outdated themselves."""
        while not self._stopping:  # a client in the middle of an answer can lose the cancellation
            await self._has_pending.wait()
            while self._pending and not self._stopping:
                tenant_id = next(iter(self._pending))
                version = self._pending.pop(tenant_id)
                if self._directory.is_erased(tenant_id):
                    await self._cache.discard(tenant_id)
                else:
                    await self._cache.invalidate(tenant_id, version)
            self._has_pending.clear()

    def _landed(self, tenant_id: TenantId, flight: asyncio.Task[Tenant]) -> None:
        if self._flights.get(tenant_id) is flight:
            del self._flights[tenant_id]
        if not flight.cancelled():
            flight.exception()  # who waited has it; when nobody waits any more, nobody wants it


def encoded(tenant: Tenant) -> bytes:
    """The value that Valkey keeps of a tenant."""
    return msgspec.json.encode(_Stored(**{name: getattr(tenant, name) for name in _Stored.__struct_fields__}))


def decoded(tenant_id: TenantId, version: int, value: bytes) -> Tenant | None:
    """The tenant in a value; None when it is not this version of this tenant, whole and valid."""
    try:
        stored = _DECODER.decode(value)
    except msgspec.DecodeError:
        return None
    if (stored.id, stored.version) != (tenant_id, version):
        return None
    return Tenant(**msgspec.structs.asdict(stored))
