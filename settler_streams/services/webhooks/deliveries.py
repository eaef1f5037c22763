"""What became of a tenant's deliveries, a delivery on request, and dead ones sent again."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.core.webhooks import TEST_TYPE
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import audit
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.webhooks import queries
from settler_streams.services.webhooks.rows import canonical_webhook, lock, missing, now_ms

if TYPE_CHECKING:
    import asyncpg

LISTED_MAX = 1_000
"""Deliveries of one answer."""
REDRIVEN_MAX = 10_000
"""Deliveries of one redrive: a transaction of a second or so."""
STATUSES = ("pending", "delivered", "dead")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event on its way to one webhook.

    ``status`` is pending, delivered or dead; ``last_outcome`` how the latest attempt ended, ``last_status`` what the
    endpoint answered.
    """

    webhook_id: str
    event_id: str
    event_type: str
    status: str
    attempts: int
    queued_at: dt.datetime
    next_attempt_at: dt.datetime
    last_attempt_at: dt.datetime | None
    last_outcome: str | None
    last_status: int | None
    finished_at: dt.datetime | None


class WebhookDeliveries:
    """The deliveries of tenants. Errors as of the webhooks' own service."""

    def __init__(self, pool: TenantConnectionPool) -> None:
        self._pool = pool

    async def recent(
        self, tenant_id: TenantId, webhook_id: str, *, status: str | None = None, limit: int = 100
    ) -> list[Delivery]:
        """The newest deliveries of a webhook, of one status or of all.

        Raises:
            InvalidRequestError: there is no such status, or the limit is not between 1 and 1,000.
        """
        if status is not None and status not in STATUSES:
            raise InvalidRequestError(f"no status {status!r}; there are {', '.join(STATUSES)}")
        if not 1 <= limit <= LISTED_MAX:
            raise InvalidRequestError(f"the limit is between 1 and {LISTED_MAX}")
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        async with self._pool.tenant(tenant_id) as tx:
            if not await tx.fetchval(queries.WEBHOOK_EXISTS, tenant_id, webhook_id):
                raise missing(tenant_id, webhook_id)
            rows = await tx.fetch(queries.LIST_DELIVERIES, tenant_id, webhook_id, status, None, limit)
        return [_delivery(row) for row in rows]

    async def get(self, tenant_id: TenantId, webhook_id: str, event_id: str) -> Delivery:
        """One delivery.

        Raises:
            NotFoundError: the webhook never had it, or it has been tidied away.
        """
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        key = _event_key(event_id)
        async with self._pool.tenant(tenant_id) as tx:
            row = await tx.fetchrow(queries.LIST_DELIVERIES, tenant_id, webhook_id, None, key, 1)
        if row is None:
            raise NotFoundError(f"webhook {webhook_id[:64]} has no delivery of {event_id[:64]}")
        return _delivery(row)

    async def send_test(
        self, tenant_id: TenantId, webhook_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> str:
        """Queue an event of type ``settler.webhook.test.v1`` for this webhook alone, to be sent at once.

        Returns:
            the event's id, under which the delivery is found.

        Raises:
            ConflictError: the webhook is not active, or another test of it has not ended.
        """
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        event_id = uuid7(now_ms())
        event = {
            "specversion": "1.0",
            "id": event_id,
            "source": "/webhooks",
            "type": TEST_TYPE,
            "time": dt.datetime.now(dt.UTC),
            "tenantid": tenant_id,
            "datacontenttype": "application/json",
            "data": {"webhook_id": webhook_id},
        }
        body = msgspec.json.encode(event).decode()
        async with self._pool.tenant(tenant_id) as tx:
            webhook = await lock(tx, tenant_id, webhook_id)
            if webhook["status"] != "active":
                raise ConflictError(f"webhook {webhook_id} is {webhook['status']}; resume it first")
            if not await tx.fetchval(queries.INSERT_TEST, tenant_id, webhook_id, event_id, TEST_TYPE, body):
                raise ConflictError(f"a test of webhook {webhook_id} is still under way")
            await tx.execute(queries.WAKE_LANE, tenant_id, webhook_id)
            await audit.record(
                tx, tenant_id, "webhook.tested", f"webhook/{webhook_id}", after={"event_id": event_id},
                actor=actor, request_id=request_id,
            )  # fmt: skip
        return event_id

    async def redrive(
        self,
        tenant_id: TenantId,
        webhook_id: str,
        event_ids: Sequence[str] | None = None,
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> list[str]:
        """Send dead deliveries again, those of ``event_ids`` or all (10,000 of them at a time, the oldest first).

        Each goes out under the id that it had, and is tried for a whole period again.

        Returns:
            the ids of the events that are pending again.

        Raises:
            ConflictError: the webhook is disabled.
            NotFoundError: an id is that of no dead delivery; nothing was changed.
        """
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        wanted = None if event_ids is None else [_event_key(event_id) for event_id in dict.fromkeys(event_ids)]
        if wanted is not None and len(wanted) > REDRIVEN_MAX:
            raise InvalidRequestError(f"at most {REDRIVEN_MAX} deliveries at a time")
        async with self._pool.tenant(tenant_id) as tx:
            if (await lock(tx, tenant_id, webhook_id))["status"] == "disabled":
                raise ConflictError(f"webhook {webhook_id} is disabled; resume it first")
            await tx.execute(queries.HOLD_LANE, tenant_id, webhook_id)
            rows = await tx.fetch(queries.REDRIVE, tenant_id, webhook_id, wanted, REDRIVEN_MAX)
            driven = sorted(str(row["event_id"]) for row in rows)
            if wanted is not None and (absent := sorted({str(one) for one in wanted} - set(driven))):
                raise NotFoundError(f"webhook {webhook_id} has no dead delivery of {', '.join(absent[:5])}")
            if driven:
                await tx.execute(queries.WAKE_LANE, tenant_id, webhook_id)
                await audit.record(
                    tx, tenant_id, "webhook.redriven", f"webhook/{webhook_id}", after={"deliveries": len(driven)},
                    actor=actor, request_id=request_id,
                )  # fmt: skip
        return driven


def _delivery(row: asyncpg.Record) -> Delivery:
    return Delivery(**{**row, "webhook_id": str(row["webhook_id"]), "event_id": str(row["event_id"])})


def _event_key(event_id: str) -> uuid.UUID:
    try:
        return uuid.UUID(event_id)
    except ValueError as error:
        raise NotFoundError(f"no event {event_id[:64]!r}: its id is a UUID") from error
