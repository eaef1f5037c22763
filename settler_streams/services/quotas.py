"""Quotas as a caller asks for them: would so much more still fit?

The limits come from the tenant's row, so a change holds at once; or, where the process keeps
:class:`TenantConfigurations`, from there, which saves a query per level, and a change holds once this process has heard
of it, or Valkey has. The use comes from the projection of admission's usage reports, which lags by about two seconds (a
report each second, then the recorder's batch): two callers can both be told that the last megabyte is free. Jobs are
not at stake, since admission decides on them by its own exact state.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import Disposition, InvalidRequestError, NotFoundError, SettlerError
from settler_streams.events import QuotaType
from settler_streams.ids import TenantId
from settler_streams.services import queries, tenant_store
from settler_streams.services.directory import CHAIN_DEPTH_MAX
from settler_streams.services.tenant_configurations import TenantConfigurations
from settler_streams.services.tenant_store import Tenant
from settler_streams.settings import Settings
from settler_streams.tiers import Tiers, load_tiers

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction


class QuotaCheck(NamedTuple):
    """The answer, with the use and limit of the level (the tenant, or a parent) that has least room."""

    allowed: bool
    current_usage: int
    limit: int


class QuotaLevel(NamedTuple):
    """One level of a tenant's chain: what is used and allowed there, and who is above it."""

    used: int
    limit: int
    enterprise: bool
    parent_id: TenantId | None


class QuotaExceededError(SettlerError):
    """The tenant has no room left under a quota; give something back, wait for the window's end, or change tier."""

    disposition = Disposition.REFUSE

    def __init__(self, quota_type: QuotaType, current_usage: int, limit: int) -> None:
        super().__init__(f"quota {quota_type} exceeded: {current_usage} of {limit} used")
        self.quota_type = quota_type
        self.current_usage = current_usage
        self.limit = limit


class QuotaService:
    """Reads quotas; what enforces them is admission and the gateway."""

    def __init__(
        self,
        pool: TenantConnectionPool,
        *,
        tiers: Tiers | None = None,
        configurations: TenantConfigurations | None = None,
    ) -> None:
        self._pool = pool
        self._tiers = tiers or load_tiers()
        self._configurations = configurations

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[QuotaService]:
        """A service with connections and a tenant cache of its own, for a process that has none yet.

        Raises:
            UnavailableError: Postgres or Kafka did not answer in time.
        """
        async with AsyncExitStack() as stack:
            pool = await TenantConnectionPool.open(settings)
            stack.push_async_callback(pool.close)
            configurations = await stack.enter_async_context(TenantConfigurations.connect(settings, pool))
            yield cls(pool, configurations=configurations)

    async def check_quota(self, tenant_id: TenantId, quota_type: QuotaType, amount: int) -> QuotaCheck:
        """Whether ``amount`` more (bytes, jobs, domains or requests) fits for the tenant and all its parents.

        An Enterprise tenant is always allowed; its use is reported all the same.

        Raises:
            InvalidRequestError: ``amount`` is negative.
            NotFoundError: there is no such tenant.
        """
        if amount < 0:
            raise InvalidRequestError(f"an amount is not negative, as {amount} is")
        # Before the transaction: who holds a connection must not wait for another one.
        chain = None if self._configurations is None else await self._chain(self._configurations, tenant_id)
        tightest: QuotaCheck | None = None
        bypass = False
        level: TenantId | None = tenant_id
        async with self._pool.tenant(tenant_id) as tx:
            for depth in range(CHAIN_DEPTH_MAX):
                if level is None:
                    break
                await TenantContext.set(tx, level)
                tenant = await tenant_store.read(tx, level) if chain is None else chain[depth]
                used, limit, enterprise, parent_id = await self._level_of(tx, tenant, quota_type)
                bypass = bypass or (enterprise and level == tenant_id)
                found = QuotaCheck(bypass or used + amount <= limit, used, limit)
                if tightest is None or found.limit - used < tightest.limit - tightest.current_usage:
                    tightest = found
                level = None if bypass else parent_id
        if tightest is None:
            raise NotFoundError(f"no tenant {tenant_id}")
        return tightest

    async def require(self, tenant_id: TenantId, quota_type: QuotaType, amount: int) -> None:
        """As :meth:`check_quota`, raising :class:`QuotaExceededError` when it does not fit."""
        check = await self.check_quota(tenant_id, quota_type, amount)
        if not check.allowed:
            raise QuotaExceededError(quota_type, check.current_usage, check.limit)

    async def _chain(self, configurations: TenantConfigurations, tenant_id: TenantId) -> list[Tenant]:
        """The tenant and its parents, as far as a check goes."""
        chain = [await configurations.read(tenant_id)]
        if self._tiers[chain[0].tier].enterprise:
            return chain
        while (parent_id := chain[-1].parent_id) is not None and len(chain) < CHAIN_DEPTH_MAX:
            chain.append(await configurations.read(parent_id))
        return chain

    async def level(self, tx: Transaction, tenant_id: TenantId, quota_type: QuotaType) -> QuotaLevel:
        """One level as stored, in whose context the transaction is afterwards.

        Raises:
            NotFoundError: there is no such tenant.
        """
        await TenantContext.set(tx, tenant_id)
        return await self._level_of(tx, await tenant_store.read(tx, tenant_id), quota_type)

    async def _level_of(self, tx: Transaction, tenant: Tenant, quota_type: QuotaType) -> QuotaLevel:
        tier = self._tiers[tenant.tier]
        limit = tenant.quotas.get(quota_type, tier.limits()[quota_type])
        if quota_type is QuotaType.RATE_LIMIT:
            limit = min(tier.burst, max(1, limit))  # what may come at once, which is what the reports count
        usage = await tx.fetchrow(queries.READ_QUOTA_USAGE, tenant.id, quota_type.value)
        used = 0 if usage is None or usage["ended"] else usage["used"]
        return QuotaLevel(used, limit, tier.enterprise, tenant.parent_id)
