"""Noisy neighbours: the detector's standing verdicts, for a tenant about itself and for operators about everyone."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.services import queries
from settler_streams.services.directory import TenantDirectory

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

TENANTS_PER_TRANSACTION = 200
"""One query per tenant, about 0.1 ms each: a transaction stays short, and others get the connection in between."""


@dataclass(frozen=True, slots=True)
class NoisyVerdict:
    """A tenant uses more than its share of a resource, since ``since``. It names nobody else.

    ``used`` and ``others_average`` are of one window, in the resource's own unit; ``others_average`` is None when the
    detector did not say.
    """

    tenant_id: TenantId
    resource: str
    since: dt.datetime
    used: int | None
    others_average: int | None
    ratio_per_mille: int | None


class NoisyNeighborDetection:
    """Reads verdicts from ``tenant_signals``, each tenant's under its own context."""

    def __init__(self, pool: TenantConnectionPool, directory: TenantDirectory) -> None:
        self._pool = pool
        self._directory = directory

    async def verdicts_of(self, tenant_id: TenantId) -> list[NoisyVerdict]:
        """What stands against one tenant now, by resource; empty when it is quiet."""
        async with self._pool.tenant(tenant_id, read_only=True) as tx:
            return await _read(tx, tenant_id)

    async def verdicts(self, tenants: Iterable[TenantId] | None = None) -> list[NoisyVerdict]:
        """For operators: what stands against any of ``tenants`` (all that are known), the worst ratio first.

        Those that were erased, or are being erased, are passed over.
        """
        wanted = list(self._directory if tenants is None else tenants)
        found: list[NoisyVerdict] = []
        for first in range(0, len(wanted), TENANTS_PER_TRANSACTION):
            part = wanted[first : first + TENANTS_PER_TRANSACTION]
            async with self._pool.tenant(PLATFORM, read_only=True) as tx:  # the one that cannot be erased
                for tenant_id in part:
                    if await TenantContext.open(tx, tenant_id):
                        found += await _read(tx, tenant_id)
                    else:  # the search path is still that of the tenant before
                        await TenantContext.set(tx, PLATFORM)
        return sorted(found, key=lambda v: (-(v.ratio_per_mille or 0), v.tenant_id, v.resource))


async def _read(tx: Transaction, tenant_id: TenantId) -> list[NoisyVerdict]:
    verdicts = []
    for row in await tx.fetch(queries.CURRENT_VERDICTS, tenant_id):
        if row["kind"] == "noisy":
            detail = json.loads(row["detail"])
            verdicts.append(
                NoisyVerdict(
                    tenant_id,
                    row["resource"],
                    row["signalled_at"],
                    detail.get("used"),
                    detail.get("others_average"),
                    detail.get("ratio_per_mille"),
                )
            )
    return verdicts
