"""Quotas as a caller asks for them: would so much more still fit, and where does a tenant stand?

The limits come from the tenant's row, so a change holds at once; or, where the process keeps
:class:`TenantConfigurations`, from there, which saves a query per level, and a change holds once this process has heard
of it, or Valkey has. The use comes from the projection of admission's usage reports, which lags by about two seconds (a
report each second, then the recorder's batch): two callers can both be told that the last megabyte is free. Jobs are
not at stake, since admission decides on them by its own exact state.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.core.quotas import month_bounds
from settler_streams.errors import Disposition, InvalidRequestError, SettlerError
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
    """The answer, with the use and limit of the level (the tenant, or a parent) that has least room.

    For those whom the platform trusts: what a parent uses is not for its children's eyes.
    """

    allowed: bool
    current_usage: int
    limit: int


class QuotaStanding(NamedTuple):
    """Where a tenant stands with one quota, as it may be told itself: of its parents, only whether one binds it.

    ``used`` and ``limit`` are the tenant's own, in bytes, jobs or domains; of the rate limit, requests that may come at
    once, beside the rate ``per_minute`` at which they come back. ``window_end_ms``: when a monthly count begins anew.
    ``bound_by`` says who has least room, the tenant or one of its parents; None: nobody is asked (Enterprise).
    """

    quota_type: QuotaType
    used: int
    limit: int
    per_minute: int | None
    window_end_ms: int | None
    bound_by: Literal["tenant", "parent"] | None


class QuotaLevel(NamedTuple):
    """One level of a tenant's chain: what is used and allowed there (of the rate limit, at once and per minute), and
    who is above it."""

    used: int
    limit: int
    enterprise: bool
    parent_id: TenantId | None
    per_minute: int | None = None


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
        levels = [level[quota_type] for level in await self._levels(tenant_id, (quota_type,))]
        tightest = min(levels, key=_room)
        return QuotaCheck(levels[0].enterprise or amount <= _room(tightest), tightest.used, tightest.limit)

    async def standings(self, tenant_id: TenantId) -> list[QuotaStanding]:
        """Where the tenant stands with each quota. Nothing in it is another tenant's, but that a parent has least room.

        Raises:
            NotFoundError: there is no such tenant, or it was erased.
            UnavailableError: no connection to Postgres became free in time.
        """
        levels = await self._levels(tenant_id, tuple(QuotaType))
        month_end_ms = month_bounds(time.time_ns() // 1_000_000)[1]
        return [
            _standing(quota_type, [level[quota_type] for level in levels], month_end_ms) for quota_type in QuotaType
        ]

    async def require(self, tenant_id: TenantId, quota_type: QuotaType, amount: int) -> None:
        """As :meth:`check_quota`, raising :class:`QuotaExceededError` when it does not fit."""
        check = await self.check_quota(tenant_id, quota_type, amount)
        if not check.allowed:
            raise QuotaExceededError(quota_type, check.current_usage, check.limit)

    async def level(self, tx: Transaction, tenant_id: TenantId, quota_type: QuotaType) -> QuotaLevel:
        """One level as stored, in whose context the transaction is afterwards.

        Raises:
            NotFoundError: there is no such tenant.
        """
        await TenantContext.set(tx, tenant_id)
        return (await self._level_of(tx, await tenant_store.read(tx, tenant_id), (quota_type,)))[quota_type]

    async def _levels(
        self, tenant_id: TenantId, quota_types: Collection[QuotaType]
    ) -> list[dict[QuotaType, QuotaLevel]]:
        """The tenant, then its parents up to the root; of an Enterprise tenant, whom no parent binds, itself alone."""
        # Before the transaction: who holds a connection must not wait for another one.
        chain = None if self._configurations is None else await self._chain(self._configurations, tenant_id)
        levels: list[dict[QuotaType, QuotaLevel]] = []
        level: TenantId | None = tenant_id
        async with self._pool.tenant(tenant_id) as tx:
            while level is not None and len(levels) < CHAIN_DEPTH_MAX:
                await TenantContext.set(tx, level)
                tenant = await tenant_store.read(tx, level) if chain is None else chain[len(levels)]
                levels.append(await self._level_of(tx, tenant, quota_types))
                level = tenant.parent_id
                if len(levels) == 1 and self._tiers[tenant.tier].enterprise:
                    break
        return levels

    async def _chain(self, configurations: TenantConfigurations, tenant_id: TenantId) -> list[Tenant]:
        """The tenant and its parents, as far as a check goes."""
        chain = [await configurations.read(tenant_id)]
        if self._tiers[chain[0].tier].enterprise:
            return chain
        while (parent_id := chain[-1].parent_id) is not None and len(chain) < CHAIN_DEPTH_MAX:
            chain.append(await configurations.read(parent_id))
        return chain

    async def _level_of(
        self, tx: Transaction, tenant: Tenant, quota_types: Collection[QuotaType]
    ) -> dict[QuotaType, QuotaLevel]:
        rows = await tx.fetch(queries.READ_QUOTA_USAGE, tenant.id)
        used = {row["quota_type"]: row["used"] for row in rows}
        tier = self._tiers[tenant.tier]
        levels = {}
        for quota_type in quota_types:
            limit, per_minute = tenant.quotas.get(quota_type, tier.limits()[quota_type]), None
            if quota_type is QuotaType.RATE_LIMIT:
                # What may come at once, which is what the reports count.
                limit, per_minute = min(tier.burst, max(1, limit)), limit
            levels[quota_type] = QuotaLevel(
                used.get(quota_type, 0), limit, tier.enterprise, tenant.parent_id, per_minute
            )
        return levels


def _room(level: QuotaLevel) -> int:
    return level.limit - level.used


def _standing(quota_type: QuotaType, levels: list[QuotaLevel], month_end_ms: int) -> QuotaStanding:
    own = levels[0]
    bound_by: Literal["tenant", "parent"] | None = "tenant" if min(levels, key=_room) is own else "parent"
    return QuotaStanding(
        quota_type,
        own.used,
        own.limit,
        own.per_minute,
        month_end_ms if quota_type is QuotaType.MONTHLY_RECONCILIATIONS else None,
        None if own.enterprise else bound_by,
    )
