"""Where a tenant's rows lie: in the shared schema or in one of its own.

A move is a version of the tenant, told in its own transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from settler_streams.adapters.postgres import tenant_schemas
from settler_streams.services import tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction
    from settler_streams.ids import TenantId
    from settler_streams.settings import Settings


async def move_tenant(
    settings: Settings,
    tenant_id: TenantId,
    *,
    own_schema: bool,
    actor: str = PLATFORM_ACTOR,
    request_id: str | None = None,
) -> int:
    """Move a tenant as :func:`tenant_schemas.move` does, with an audit entry and an event, or nothing of all.

    Returns how many rows moved; no entry, and 0, where the tenant is there already. Errors as there.
    """

    async def note(tx: Transaction, moved: int) -> None:
        places = ("shared", "own") if own_schema else ("own", "shared")
        await tenant_store.hold(tx, tenant_id)
        await tenant_store.record_owned(
            tx, tenant_id, "tenant.moved", f"tenant/{tenant_id}",
            before={"schema": places[0]}, after={"schema": places[1], "rows": moved},
            actor=actor, request_id=request_id,
        )  # fmt: skip

    return await tenant_schemas.move(settings, tenant_id, own_schema=own_schema, note=note)
