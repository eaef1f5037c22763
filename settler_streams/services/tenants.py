"""Tenants: created, moved between tiers, suspended and reactivated, each change in one transaction.

A change writes the tenant's row (one version more), an audit entry, and the event ``settler.tenant.changed.v1`` in the
outbox, or nothing at all. It returns once admission decides by the new version.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from settler_streams.adapters.postgres import outbox
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.queries import CREATE_TENANT_SCHEMA
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.events import QuotaType, TenantChanged, TenantStatus, TenantTier, encode, envelope
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import queries
from settler_streams.services.acknowledgements import Acknowledgements, Awaited
from settler_streams.services.api_keys import ApiKeys, IssuedApiKey, Principal, Scope
from settler_streams.services.directory import CHAIN_DEPTH_MAX
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.passwords import hash_password
from settler_streams.services.publisher import EventPublisher
from settler_streams.settings import Settings

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

__all__ = ["CreatedTenant", "Owner", "Tenant", "TenantNotYetKnownError", "TenantService", "hash_password"]

SOURCE = "/tenant-service"
PLATFORM_ACTOR = "platform"
"""The actor of a change that nobody in particular asked for."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as stored. ``quotas`` overrides the tier's limits; ``version`` grows by one with every change."""

    id: TenantId
    slug: str
    name: str
    tier: TenantTier
    status: TenantStatus
    root_id: TenantId
    parent_id: TenantId | None
    version: int
    quotas: Mapping[QuotaType, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Owner:
    """The user who owns a tenant."""

    id: str
    tenant_id: TenantId
    email: str


class CreatedTenant(NamedTuple):
    """A new tenant and its owner."""

    tenant: Tenant
    owner: Owner


class TenantNotYetKnownError(UnavailableError):
    """The change is stored, and admission will know of it soon; it only could not be waited for. Do not repeat it."""

    def __init__(self, tenant: Tenant, reason: str) -> None:
        super().__init__(
            f"tenant {tenant.id} ({tenant.slug}) is stored as version {tenant.version} and will be known soon: {reason}"
        )
        self.tenant = tenant


class TenantService:
    """The only writer of ``tenants``. Start ``relay`` and ``acknowledgements`` before it is used."""

    def __init__(
        self,
        pool: TenantConnectionPool,
        relay: OutboxRelay,
        acknowledgements: Acknowledgements,
        *,
        own_schemas: bool = False,
    ) -> None:
        self._pool = pool
        self._own_schemas = own_schemas
        self._relay = relay
        self._acknowledgements = acknowledgements
        self.api_keys = ApiKeys(pool)

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[TenantService]:
        """A service with connections of its own, for a process that has none yet.

        Raises:
            UnavailableError: Postgres or Kafka did not answer in time.
        """
        async with AsyncExitStack() as stack:
            pool = await TenantConnectionPool.open(settings)
            stack.push_async_callback(pool.close)
            publisher = EventPublisher(settings, source=SOURCE)
            relay, acknowledgements = OutboxRelay(pool, publisher), Acknowledgements(settings)
            for part in (publisher, relay, acknowledgements):
                await part.start()
                stack.push_async_callback(part.stop)
            yield cls(pool, relay, acknowledgements, own_schemas=settings.enable_schema_per_tenant)

    async def create_tenant(
        self,
        *,
        name: str,
        slug: str,
        owner_email: str,
        owner_password_hash: str,
        tier: TenantTier = TenantTier.STARTER,
        parent_id: TenantId | None = None,
        quotas: Mapping[QuotaType, int] | None = None,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> CreatedTenant:
        """Create a tenant and its owner; returns once admission knows it, so its first job is not refused.

        Raises:
            ConflictError: the slug is taken.
            InvalidRequestError: a field breaks its rule, the parent is not active, or the hierarchy would be too deep.
            NotFoundError: there is no such parent.
            TenantNotYetKnownError: the tenant exists, but admission has not said so in time.
            UnavailableError: Postgres failed; a lost commit may have created it, which the slug then tells.
        """
        now_ms = time.time_ns() // 1_000_000
        tenant_id = TenantId(uuid7(now_ms))
        owner = Owner(uuid7(now_ms), tenant_id, owner_email.strip().lower())
        with self._acknowledgements.expect(tenant_id) as awaited:
            with _explained(f"the slug {slug!r} is taken"):
                async with self._pool.tenant(tenant_id) as tx:
                    root_id = await _root_under(tx, parent_id) if parent_id else tenant_id
                    await TenantContext.set(tx, tenant_id)
                    tenant = Tenant(
                        tenant_id, slug, name, tier, TenantStatus.ACTIVE, root_id, parent_id, 1, dict(quotas or {})
                    )
                    await _insert(tx, tenant)
                    if self._own_schemas:
                        await tx.execute(CREATE_TENANT_SCHEMA)
                        await TenantContext.set(tx, tenant_id)  # whose tables are there from now on
                    await tx.execute(queries.INSERT_OWNER, tenant_id, owner.id, owner.email, owner_password_hash)
                    await _record(tx, tenant, None, "tenant.created", actor, request_id)
            await self._acknowledged(tenant, awaited)
        return CreatedTenant(tenant, owner)

    async def change_tier(
        self, tenant_id: TenantId, tier: TenantTier, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Tenant:
        """Move a tenant to ``tier``; what waits in its pools is weighed anew. Errors as :meth:`suspend`."""
        return await self._change(tenant_id, "tenant.tier-changed", lambda t: replace(t, tier=tier), actor, request_id)

    async def change_quotas(
        self,
        tenant_id: TenantId,
        quotas: Mapping[QuotaType, int],
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> Tenant:
        """Replace the tenant's own limits; a quota that is absent has its tier's limit. Errors as :meth:`suspend`."""
        if any(limit < 0 for limit in quotas.values()):
            raise InvalidRequestError("a limit is not negative")
        return await self._change(
            tenant_id, "tenant.quotas-changed", lambda t: replace(t, quotas=dict(quotas)), actor, request_id
        )

    async def suspend(
        self, tenant_id: TenantId, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Tenant:
        """Have every further request of the tenant and of its children refused; what runs, ends.

        Raises:
            NotFoundError: there is no such tenant.
            ConflictError: the tenant was deleted.
            TenantNotYetKnownError: the change is stored, but admission has not said that it knows it.
            UnavailableError: Postgres failed.
        """
        return await self._change(
            tenant_id, "tenant.suspended", lambda t: replace(t, status=TenantStatus.SUSPENDED), actor, request_id
        )

    async def reactivate(
        self, tenant_id: TenantId, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Tenant:
        """Undo :meth:`suspend`. Errors as there."""
        return await self._change(
            tenant_id, "tenant.reactivated", lambda t: replace(t, status=TenantStatus.ACTIVE), actor, request_id
        )

    async def get(self, tenant_id: TenantId) -> Tenant:
        """The tenant as stored.

        Raises:
            NotFoundError: there is no such tenant.
        """
        async with self._pool.tenant(tenant_id) as tx:
            return await _read(tx, tenant_id, queries.READ_TENANT)

    async def issue_api_key(self, tenant_id: TenantId, scopes: Iterable[Scope | str]) -> IssuedApiKey:
        """A new key of the tenant, shown this once; see :meth:`ApiKeys.issue`."""
        return await self.api_keys.issue(tenant_id, scopes)

    async def authenticate(self, api_key: str) -> Principal:
        """Whom a key speaks for; see :meth:`ApiKeys.authenticate`."""
        return await self.api_keys.authenticate(api_key)

    async def _change(
        self,
        tenant_id: TenantId,
        action: str,
        change: Callable[[Tenant], Tenant],
        actor: str,
        request_id: str | None,
    ) -> Tenant:
        """1. Lock the row; 2. write the next version; 3. audit and outbox; 4. commit; 5. wait for admission."""
        with self._acknowledgements.expect(tenant_id) as awaited:
            async with self._pool.tenant(tenant_id) as tx:
                before = await _read(tx, tenant_id, queries.LOCK_TENANT)
                if before.status is TenantStatus.DELETED:
                    raise ConflictError(f"tenant {tenant_id} was deleted")
                after = change(before)
                if after == before:
                    return before
                after = replace(after, version=before.version + 1)
                await tx.execute(
                    queries.UPDATE_TENANT,
                    tenant_id,
                    after.tier.value,
                    after.status.value,
                    json.dumps(after.quotas),
                    after.version,
                )
                await _record(tx, after, before, action, actor, request_id)
            await self._acknowledged(after, awaited)
        return after

    async def _acknowledged(self, tenant: Tenant, awaited: Awaited) -> None:
        self._relay.nudge()
        try:
            await awaited.wait(tenant.version)
        except UnavailableError as error:
            raise TenantNotYetKnownError(tenant, str(error)) from error


async def _read(tx: Transaction, tenant_id: TenantId, query: str) -> Tenant:
    row = await tx.fetchrow(query, tenant_id)
    if row is None:
        raise NotFoundError(f"no tenant {tenant_id}")
    return Tenant(
        id=TenantId(str(row["id"])),
        slug=row["slug"],
        name=row["name"],
        tier=TenantTier(row["tier"]),
        status=TenantStatus(row["status"]),
        root_id=TenantId(str(row["root_id"])),
        parent_id=TenantId(str(row["parent_id"])) if row["parent_id"] else None,
        version=row["version"],
        quotas={QuotaType(name): limit for name, limit in json.loads(row["quotas"]).items()},
        config=json.loads(row["config"]),
    )


async def _root_under(tx: Transaction, parent_id: TenantId) -> TenantId:
    """The root of a new child of ``parent_id``. Each level is read in its own context; the audit entry names it."""
    depth = 1
    level: TenantId | None = parent_id
    root_id = parent_id
    while level is not None:
        depth += 1
        if depth > CHAIN_DEPTH_MAX:
            raise InvalidRequestError(f"a hierarchy has at most {CHAIN_DEPTH_MAX} levels")
        await TenantContext.set(tx, level)
        tenant = await _read(tx, level, queries.READ_TENANT)
        if tenant.status is not TenantStatus.ACTIVE:
            raise InvalidRequestError(f"tenant {level} is {tenant.status}: it cannot have a new child")
        root_id, level = tenant.root_id, tenant.parent_id
    return root_id


async def _insert(tx: Transaction, tenant: Tenant) -> None:
    await tx.execute(
        queries.INSERT_TENANT,
        tenant.id,
        tenant.parent_id,
        tenant.root_id,
        tenant.slug,
        tenant.name,
        tenant.tier.value,
        json.dumps(tenant.config),
        json.dumps(tenant.quotas),
    )


async def _record(
    tx: Transaction, after: Tenant, before: Tenant | None, action: str, actor: str, request_id: str | None
) -> None:
    """The audit entry and the outbox entry of a change; both carry the id of the event."""
    now = dt.datetime.now(dt.UTC)
    event_id = uuid7(int(now.timestamp() * 1000))
    await tx.execute(
        queries.INSERT_AUDIT_ENTRY,
        after.id,
        event_id,
        actor,
        action,
        f"tenant/{after.id}",
        _audited(before) if before else None,
        _audited(after),
        request_id,
    )
    changed = TenantChanged(
        version=after.version,
        slug=after.slug,
        tier=after.tier,
        status=after.status,
        root_id=after.root_id,
        parent_id=after.parent_id,
        quotas=dict(after.quotas),
    )
    event = envelope(changed, event_id=event_id, source=SOURCE, tenant=after.id, time=now, subject=after.id)
    await outbox.append(tx, after.id, "tenant-changes", after.root_id, encode(event))


def _audited(tenant: Tenant) -> str:
    return json.dumps(
        {
            "slug": tenant.slug,
            "name": tenant.name,
            "tier": tenant.tier,
            "status": tenant.status,
            "parent_id": tenant.parent_id,
            "version": tenant.version,
            "quotas": dict(tenant.quotas),
        }
    )


@contextmanager
def _explained(taken: str) -> Iterator[None]:
    """Say what a refusal of the row means: a taken value, or a broken rule."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        raise ConflictError(taken) from error
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise InvalidRequestError(f"the tenant breaks a rule of its table: {error}") from error
