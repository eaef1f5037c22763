"""Events that reach Kafka because a transaction committed.

Delivery is at least once: an event leaves the outbox after Kafka has acknowledged it, and a relay that dies in between
sends it again. A tenant's events leave in the order of its transactions, since they all lock the tenant's own row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from settler_streams.adapters.postgres import queries
from settler_streams.ids import TenantId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from settler_streams.adapters.postgres.pool import Transaction


class PendingEvent(NamedTuple):
    """An encoded event that waits to be published to ``topic`` under ``key``."""

    tenant_id: TenantId
    id: int
    topic: str
    key: str
    event: bytes


async def append(transaction: Transaction, tenant_id: TenantId, topic: str, key: str, event: bytes) -> None:
    """Add an event to the tenant's transaction: both happen or neither does."""
    await transaction.execute(queries.APPEND_EVENT, tenant_id, topic, key, event)


async def pending(transaction: Transaction, events_max: int) -> list[PendingEvent]:
    """The oldest events, in order; none while another relay is at work.

    Args:
        transaction: from ``pool.relay()``; keep it open until the events are published and discarded.
        events_max: how many at most.
    """
    if not await transaction.fetchval(queries.ONE_RELAY):
        return []
    rows = await transaction.fetch(queries.PENDING_EVENTS, events_max)
    return [PendingEvent(TenantId(str(row[0])), *row[1:]) for row in rows]


async def discard(transaction: Transaction, events: Sequence[PendingEvent]) -> None:
    """Remove events that Kafka has acknowledged."""
    await transaction.execute(queries.DISCARD_EVENTS, [e.tenant_id for e in events], [e.id for e in events])
