"""The audit log: what a change writes of itself, in its own transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from settler_streams.ids import TenantId, uuid7
from settler_streams.services import queries

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

PLATFORM_ACTOR = "platform"
"""The actor of a change that nobody in particular asked for."""

Audited = Mapping[str, Any]
"""What an entry says of a thing before or after a change. Never a secret, nor its hash."""


async def record(
    tx: Transaction,
    tenant_id: TenantId,
    action: str,
    subject: str,
    *,
    before: Audited | None = None,
    after: Audited | None = None,
    actor: str,
    request_id: str | None,
    entry_id: str | None = None,
) -> None:
    """Write an entry; ``entry_id`` is the id of the event that tells the same, if there is one."""
    await tx.execute(
        queries.INSERT_AUDIT_ENTRY,
        tenant_id,
        entry_id or uuid7(time.time_ns() // 1_000_000),
        actor,
        action,
        subject,
        None if before is None else json.dumps(before, default=str),
        None if after is None else json.dumps(after, default=str),
        request_id,
    )
