"""Webhooks as their tenant manages them: each change is one audited transaction in the tenant's own
context, and a version more of the tenant.

A secret is shown when it is made and never again. It is stored encrypted, since every delivery needs it in clear.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.core.webhooks import SECRET_BYTES, event_types, secret_text
from settler_streams.errors import ConflictError, InvalidRequestError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.webhooks import queries
from settler_streams.services.webhooks.deliveries import WebhookDeliveries
from settler_streams.services.webhooks.destinations import Rules
from settler_streams.services.webhooks.keyring import KeyRing
from settler_streams.services.webhooks.rows import (
    canonical_webhook,
    changed,
    lock,
    missing,
    now_ms,
    owner,
)
from settler_streams.settings import Settings

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.adapters.postgres.pool import Transaction

OVERLAP_S = 86_400
"""For a day after a rotation both secrets sign: a receiver that knows either accepts."""
OVERLAP_S_MAX = 30 * 86_400
REMOVED_MAX = 10_000
"""Deliveries that one transaction of a removal deletes, in some tenths of a second."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook as its tenant sees it. No ``event_types`` means all public ones.

    ``status`` is active, paused (deliveries queue) or disabled (nothing queues). ``failures`` counts those since the
    last success, ``pending`` what waits, ``skipped`` events that found the queue full.
    """

    id: str
    url: str
    event_types: tuple[str, ...]
    status: str
    disabled_reason: str | None
    created_at: dt.datetime
    previous_secret_until: dt.datetime | None
    failures: int
    pending: int
    skipped: int


@dataclass(frozen=True, slots=True)
class IssuedSecret:
    """A new secret of a webhook. ``secret`` exists only here: whoever loses it has to rotate."""

    webhook_id: str
    secret: str = field(repr=False)


class WebhookService:
    """The webhooks of tenants.

    Every method raises UnavailableError when Postgres fails, and NotFoundError when the tenant has no such webhook.
    """

    def __init__(self, pool: TenantConnectionPool, settings: Settings) -> None:
        self._pool = pool
        self._rules = Rules.of(settings)
        self._keys = KeyRing(settings)
        self._per_tenant_max = settings.webhooks_per_tenant
        self.deliveries = WebhookDeliveries(pool)

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[WebhookService]:
        """A service with connections of its own, for a process that has none yet."""
        pool = await TenantConnectionPool.open(settings)
        try:
            yield cls(pool, settings)
        finally:
            await pool.close()

    async def create(
        self,
        tenant_id: TenantId,
        url: str,
        types: Iterable[str] = (),
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> IssuedSecret:
        """Make a webhook for events of ``types`` (none: all public ones) from now on.

        Raises:
            ConflictError: the tenant was deleted, or has as many webhooks as it may.
            ConfigurationError: there is no key to encrypt the secret with.
            InvalidRequestError: the URL or an event type is not acceptable.
            NotFoundError: there is no such tenant.
        """
        self._rules.destination(url)
        wanted = event_types(types)
        webhook_id = uuid7(now_ms())
        secret = secrets.token_bytes(SECRET_BYTES)
        sealed = self._keys.seal(secret, owner(tenant_id, webhook_id))
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            if await tx.fetchval(queries.COUNT_WEBHOOKS, tenant_id) >= self._per_tenant_max:
                raise ConflictError(f"a tenant has at most {self._per_tenant_max} webhooks; remove one first")
            await tx.execute(queries.INSERT_WEBHOOK, tenant_id, webhook_id, url, wanted, sealed.key_id, sealed.blob)
            await tx.execute(queries.INSERT_LANE, tenant_id, webhook_id)
            after = {"url": url, "event_types": wanted}
            await changed(tx, tenant_id, webhook_id, "webhook.created", actor, request_id, after=after)
        return IssuedSecret(webhook_id, secret_text(secret))

    async def list(self, tenant_id: TenantId) -> list[Webhook]:
        """The tenant's webhooks, oldest first."""
        async with self._pool.tenant(tenant_id) as tx:
            return [_webhook(row) for row in await tx.fetch(queries.READ_WEBHOOKS, tenant_id, None)]

    async def get(self, tenant_id: TenantId, webhook_id: str) -> Webhook:
        """One of them."""
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        async with self._pool.tenant(tenant_id) as tx:
            row = await tx.fetchrow(queries.READ_WEBHOOKS, tenant_id, webhook_id)
        if row is None:
            raise missing(tenant_id, webhook_id)
        return _webhook(row)

    async def pause(
        self, tenant_id: TenantId, webhook_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Webhook:
        """Send nothing until :meth:`resume`; what happens meanwhile queues. What is under way ends.

        Raises:
            ConflictError: it is disabled.
        """
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await lock(tx, tenant_id, webhook_id)
            if before["status"] == "disabled":
                raise ConflictError(f"webhook {webhook_id} is disabled")
            await _set_status(tx, tenant_id, webhook_id, before["status"], "paused", actor, request_id)
        return await self.get(tenant_id, webhook_id)

    async def resume(
        self, tenant_id: TenantId, webhook_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Webhook:
        """Send again, what has queued first; also lets a disabled webhook hear of new events."""
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await lock(tx, tenant_id, webhook_id)
            await _set_status(tx, tenant_id, webhook_id, before["status"], "active", actor, request_id)
        return await self.get(tenant_id, webhook_id)

    async def rotate_secret(
        self,
        tenant_id: TenantId,
        webhook_id: str,
        *,
        overlap_s: int = OVERLAP_S,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> IssuedSecret:
        """Make a new secret; the old one signs beside it for ``overlap_s`` seconds more, 0 for not at all.

        The one before the old, if it still signed, ends now.

        Raises:
            ConfigurationError: there is no key to encrypt the secret with.
            InvalidRequestError: the overlap is negative or longer than thirty days.
        """
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise InvalidRequestError(f"the overlap is between 0 and {OVERLAP_S_MAX} s")
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        secret = secrets.token_bytes(SECRET_BYTES)
        sealed = self._keys.seal(secret, owner(tenant_id, webhook_id))
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            await lock(tx, tenant_id, webhook_id)
            await tx.execute(queries.ROTATE, tenant_id, webhook_id, sealed.key_id, sealed.blob, float(overlap_s))
            after = {"overlap_s": overlap_s}
            await changed(tx, tenant_id, webhook_id, "webhook.secret-rotated", actor, request_id, after=after)
        return IssuedSecret(webhook_id, secret_text(secret))

    async def delete(
        self, tenant_id: TenantId, webhook_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> None:
        """Remove a webhook and its deliveries, sent or not.

        10,000 of them go in a transaction. If there are more, it is disabled with the first, for ``removing``, which is
        a change of its own; from then on nobody waits for it. Stopped half-way it stays so, and the same call goes on.
        """
        webhook_id = canonical_webhook(tenant_id, webhook_id)
        while await self._delete_batch(tenant_id, webhook_id, actor, request_id):
            pass

    async def _delete_batch(self, tenant_id: TenantId, webhook_id: str, actor: str, request_id: str | None) -> bool:
        """Delete some deliveries, and with the last of them the webhook; whether there may be more."""
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            webhook = await tx.fetchrow(queries.TAKE_WEBHOOK, tenant_id, webhook_id)
            if webhook is None:
                raise missing(tenant_id, webhook_id)
            deleted = await tx.execute(queries.DELETE_DELIVERIES, tenant_id, webhook_id, REMOVED_MAX)
            if deleted != f"DELETE {REMOVED_MAX}":
                await tx.execute(queries.DELETE_WEBHOOK, tenant_id, webhook_id)
                await tx.execute(queries.DELETE_LANE, tenant_id, webhook_id)
                before = {"url": webhook["url"]}
                await changed(tx, tenant_id, webhook_id, "webhook.removed", actor, request_id, before=before)
                return False
            if webhook["status"] != "disabled":
                # Nothing more is queued or sent, and whoever queues for others does not wait for the next batch.
                await tx.execute(queries.SET_STATUS, tenant_id, webhook_id, "disabled", "removing")
                after = {"status": "disabled", "reason": "removing"}
                await changed(tx, tenant_id, webhook_id, "webhook.disabled", actor, request_id, after=after)
            return True


async def _set_status(
    tx: Transaction,
    tenant_id: TenantId,
    webhook_id: str,
    before: str,
    after: str,
    actor: str,
    request_id: str | None,
) -> None:
    if before == after:
        return
    await tx.execute(queries.SET_STATUS, tenant_id, webhook_id, after, None)
    if after == "active":
        await tx.execute(queries.WAKE_LANE, tenant_id, webhook_id)
    action = "webhook.paused" if after == "paused" else "webhook.resumed"
    await changed(
        tx, tenant_id, webhook_id, action, actor, request_id, before={"status": before}, after={"status": after}
    )


def _webhook(row: asyncpg.Record) -> Webhook:
    return Webhook(**{**row, "id": str(row["id"]), "event_types": tuple(row["event_types"])})
