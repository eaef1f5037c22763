"""What the rows of webhooks have in common: whose they are, how one is locked, how a change is told."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from settler_streams.errors import NotFoundError
from settler_streams.ids import TenantId
from settler_streams.services import audit, tenant_store
from settler_streams.services.webhooks import queries

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.adapters.postgres.pool import Transaction


def owner(tenant_id: TenantId, webhook_id: str) -> str:
    """The row that a secret belongs to."""
    return f"{tenant_id}/{webhook_id}"


async def changed(
    tx: Transaction,
    tenant_id: TenantId,
    webhook_id: str,
    action: str,
    actor: str,
    request_id: str | None = None,
    *,
    before: audit.Audited | None = None,
    after: audit.Audited | None = None,
) -> None:
    """Say who changed what of a webhook, see :func:`.tenant_store.record_owned`: the tenant is locked already."""
    await tenant_store.record_owned(
        tx, tenant_id, action, f"webhook/{webhook_id}", before=before, after=after, actor=actor, request_id=request_id
    )


async def lock(tx: Transaction, tenant_id: TenantId, webhook_id: str) -> asyncpg.Record:
    """The webhook's row, for the rest of the transaction.

    Raises:
        NotFoundError: the tenant has none of that id.
    """
    row = await tx.fetchrow(queries.LOCK_WEBHOOK, tenant_id, webhook_id)
    if row is None:
        raise missing(tenant_id, webhook_id)
    return row


def canonical_webhook(tenant_id: TenantId, webhook_id: str) -> str:
    """The id in canonical form: a secret is bound to it, so there must be no second way to write it.

    Raises:
        NotFoundError: it is no UUID, so there is no such webhook.
    """
    try:
        return str(uuid.UUID(webhook_id))
    except ValueError as error:
        raise missing(tenant_id, webhook_id) from error


def missing(tenant_id: TenantId, webhook_id: str) -> NotFoundError:
    """The error that says so."""
    return NotFoundError(f"tenant {tenant_id} has no webhook {webhook_id[:64]}")


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000
