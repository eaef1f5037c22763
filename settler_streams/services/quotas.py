"""Quotas as a caller asks for them: would so much more still fit?

The limits come from the tenant's row, so a change holds at once. The use comes from the projection of admission's
usage reports, which lags by about two seconds (a report each second, then the recorder's batch): two callers can both
be told that the last megabyte is free. Jobs are not at stake, since admission decides on them by its own exact state.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import Disposition, InvalidRequestError, NotFoundError, SettlerError
from settler_streams.events import QuotaType, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import queries
from settler_streams.services.directory import CHAIN_DEPTH_MAX
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

    def __init__(self, pool: TenantConnectionPool, *, tiers: Tiers | None = None) -> None:
        self._pool = pool
        self._tiers = tiers or load_tiers()

    async def check_quota(self, tenant_id: TenantId, quota_type: QuotaType, amount: int) -> QuotaCheck:
        """Whether ``amount`` more (bytes, jobs, domains or requests) fits for the tenant and all its parents.

        An Enterprise tenant is always allowed; its use is reported all the same.

        Raises:
            InvalidRequestError: ``amount`` is negative.
            NotFoundError: there is no such tenant.
        """
        if amount < 0:
            raise InvalidRequestError(f"an amount is not negative, as {amount} is")
        tightest: QuotaCheck | None = None
        bypass = False
        level: TenantId | None = tenant_id
        async with self._pool.tenant(tenant_id) as tx:
            for _ in range(CHAIN_DEPTH_MAX):
                if level is None:
                    break
                used, limit, enterprise, parent_id = await self.level(tx, level, quota_type)
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

    async def level(self, tx: Transaction, tenant_id: TenantId, quota_type: QuotaType) -> QuotaLevel:
        """One level, in whose context the transaction is afterwards.

        Raises:
            NotFoundError: there is no such tenant.
        """
        await TenantContext.set(tx, tenant_id)
        row = await tx.fetchrow(queries.READ_TENANT, tenant_id)
        if row is None:
            raise NotFoundError(f"no tenant {tenant_id}")
        tier = self._tiers[TenantTier(row["tier"])]
        limit = json.loads(row["quotas"]).get(quota_type.value, tier.limits()[quota_type])
        if quota_type is QuotaType.RATE_LIMIT:
            limit = min(tier.burst, max(1, limit))  # what may come at once, which is what the reports count
        usage = await tx.fetchrow(queries.READ_QUOTA_USAGE, tenant_id, quota_type.value)
        used = 0 if usage is None or usage["ended"] else usage["used"]
        parent_id = TenantId(str(row["parent_id"])) if row["parent_id"] else None
        return QuotaLevel(used, limit, tier.enterprise, parent_id)
