"""The noisy-neighbour verdicts that were recorded about the demo's tenants."""

from __future__ import annotations

import json
from dataclasses import dataclass

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.ids import TenantId


@dataclass(frozen=True, slots=True)
class NoiseSeen:
    """One verdict: what the tenant used in a window, and what the others used on average."""

    tenant: TenantId
    resource: str
    used: int
    others_average: int
    ratio_per_mille: int | None


async def noise_of(pool: TenantConnectionPool, tenant: TenantId) -> list[NoiseSeen]:
    """Every verdict against one tenant, oldest first, whether it still stands or not."""
    async with pool.tenant(tenant) as tx:
        rows = await tx.fetch(
            "SELECT resource, detail FROM tenant_signals WHERE tenant_id = $1 AND kind = 'noisy' ORDER BY signalled_at",
            tenant,
        )
    verdicts = []
    for row in rows:
        detail = json.loads(row["detail"])
        verdicts.append(
            NoiseSeen(tenant, row["resource"], detail["used"], detail["others_average"], detail.get("ratio_per_mille"))
        )
    return verdicts
