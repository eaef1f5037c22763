"""What the rows of webhooks have in common: whose they are, how one is locked, how a change is audited."""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from settler_streams.errors import NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services.queries import INSERT_AUDIT_ENTRY
from settler_streams.services.webhooks import queries

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.adapters.postgres.pool import Transaction

PLATFORM_ACTOR = "platform"
"""The actor of a change that nobody in particular asked for."""


def owner(tenant_id: TenantId, webhook_id: str) -> str:
    """The row that a secret belongs to."""
    return f"{tenant_id}/{webhook_id}"


async def audit(
    tx: Transaction,
    tenant_id: TenantId,
    webhook_id: str,
    action: str,
    actor: str,
    request_id: str | None = None,
    *,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> None:
    """Write who did what to a webhook, in the transaction of the change."""
    await tx.execute(
        INSERT_AUDIT_ENTRY, tenant_id, uuid7(now_ms()), actor, action, f"webhook/{webhook_id}",
        None if before is None else json.dumps(before), None if after is None else json.dumps(after), request_id,
    )  # fmt: skip


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
