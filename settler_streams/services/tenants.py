"""Tenants: created, changed, suspended, deleted and restored, each change in one transaction.

A change writes the tenant's row (one version more), an audit entry, and the event ``settler.tenant.changed.v1`` in the
outbox, or nothing at all. It returns once admission decides by the new version. What a change finds as it would have it
is no new version, but waited for all the same.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.queries import CREATE_TENANT_SCHEMA
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import QuotaType, TenantStatus, TenantTier
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import audit, queries, tenant_lists, tenant_store
from settler_streams.services.acknowledgements import Acknowledgements, Awaited
from settler_streams.services.api_keys import ApiKeys, IssuedApiKey, Principal, Scope
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.passwords import hash_password
from settler_streams.services.publisher import EventPublisher
from settler_streams.services.refusals import taken
from settler_streams.services.tenant_config import checked_config
from settler_streams.services.tenant_quotas import adjusted
from settler_streams.services.tenant_store import SOURCE, VALUE_FORMAT, Tenant
from settler_streams.settings import Settings

__all__ = ["CreatedTenant", "Owner", "Tenant", "TenantNotYetKnownError", "TenantService", "hash_password"]

DELETE_GRACE = dt.timedelta(days=30)
"""As the setting has it by default: long enough for a mistake to be noticed at the month's end."""
DELETE_GRACE_MAX = dt.timedelta(days=3650)
CHILDREN_MAX = 1_000
"""Of one answer; the next one starts behind its last."""


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
    """The change is stored, and admission will know of it soon; it only could not be waited for."""

    def __init__(self, tenant: Tenant, reason: str) -> None:
        super().__init__(
            f"tenant {tenant.id} ({tenant.slug}) is stored as version {tenant.version} and will be known soon: {reason}"
        )
        self.tenant = tenant


class Copies(Protocol):
    """Copies of tenants' rows somewhere, of which a change makes those older than it void."""

    async def invalidate(self, tenant_id: TenantId, version: int) -> bool: ...


class TenantService:
    """The only writer of ``tenants``. Start ``relay`` and ``acknowledgements`` before it is used.

    ``copies`` hear of a change right after its commit, before the call returns; who cannot be told then hears of it by
    the change's event, as everybody does.
    """

    def __init__(
        self,
        pool: TenantConnectionPool,
        relay: OutboxRelay,
        acknowledgements: Acknowledgements,
        copies: Copies | None = None,
        *,
        own_schemas: bool = False,
        delete_grace: dt.timedelta = DELETE_GRACE,
    ) -> None:
        self._pool = pool
        self._copies = copies
        self._delete_grace = delete_grace
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
            copies = TenantCache(settings, value_format=VALUE_FORMAT)
            stack.push_async_callback(copies.close)
            yield cls(
                pool, relay, acknowledgements, copies,
                own_schemas=settings.enable_schema_per_tenant,
                delete_grace=dt.timedelta(days=settings.tenant_delete_grace_days),
            )  # fmt: skip

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
        own = adjusted({}, quotas or {})
        now_ms = time.time_ns() // 1_000_000
        tenant_id = TenantId(uuid7(now_ms))
        owner = Owner(uuid7(now_ms), tenant_id, owner_email.strip().lower())
        with self._acknowledgements.expect(tenant_id) as awaited:
            with taken(f"the slug {slug!r} is taken", of="tenant"):
                async with self._pool.tenant(tenant_id) as tx:
                    root_id = await tenant_store.root_under(tx, parent_id) if parent_id else tenant_id
                    await TenantContext.set(tx, tenant_id)
                    tenant = Tenant(tenant_id, slug, name, tier, TenantStatus.ACTIVE, root_id, parent_id, 1, own)
                    await tenant_store.insert(tx, tenant)
                    if self._own_schemas:
                        await tx.execute(CREATE_TENANT_SCHEMA)
                        await TenantContext.set(tx, tenant_id)  # whose tables are there from now on
                    await tx.execute(queries.INSERT_OWNER, tenant_id, owner.id, owner.email, owner_password_hash)
                    await tenant_store.record(tx, tenant, None, "tenant.created", actor, request_id)
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
        """Replace the tenant's own limits; one that is absent is its tier's. Errors as :meth:`adjust_quotas`."""
        own = adjusted({}, quotas)
        return await self._change(
            tenant_id, "tenant.quotas-changed", lambda t: replace(t, quotas=own), actor, request_id
        )

    async def adjust_quotas(
        self,
        tenant_id: TenantId,
        limits: Mapping[QuotaType, int | None],
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> Tenant:
        """Give the tenant these limits of its own, None its tier's again; the others stay as the locked row has them.

        Raises:
            InvalidRequestError: a limit is negative or too large.

        Other errors as :meth:`suspend`.
        """
        return await self._change(
            tenant_id,
            "tenant.quotas-changed",
            lambda t: replace(t, quotas=adjusted(t.quotas, limits)),
            actor,
            request_id,
        )

    async def rename(
        self, tenant_id: TenantId, name: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Tenant:
        """Give a tenant another name for people, of 1 to 200 characters; its slug stays. Errors as :meth:`suspend`."""
        return await self._change(tenant_id, "tenant.renamed", lambda t: replace(t, name=name), actor, request_id)

    async def change_config(
        self,
        tenant_id: TenantId,
        config: Mapping[str, Any],
        *,
        if_version: int | None = None,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> Tenant:
        """Replace the tenant's configuration: a JSON object of 16 KiB at most. Every version is in the audit log.

        Args:
            tenant_id: whose.
            config: the whole of it.
            if_version: the tenant's version that the change is based on; no change to another one.
            actor: who wants it.
            request_id: of the request that asked for it.

        Raises:
            ConflictError: the tenant has another version than ``if_version``, or was deleted.
            InvalidRequestError: it is no JSON object, or too large.

        Other errors as :meth:`suspend`.
        """
        checked = checked_config(config)
        return await self._change(
            tenant_id, "tenant.config-changed", lambda t: replace(t, config=checked), actor, request_id,
            check=tenant_store.at_version(if_version),
        )  # fmt: skip

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

    async def delete(
        self,
        tenant_id: TenantId,
        *,
        grace: dt.timedelta | None = None,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> Tenant:
        """Refuse every further request of the tenant and its API keys; nothing is erased before ``grace`` is over.

        Args:
            tenant_id: which.
            grace: how long :meth:`restore` can undo it; by default ``TENANT_DELETE_GRACE_DAYS``.
            actor: who wants it.
            request_id: of the request that asked for it.

        Raises:
            ConflictError: the tenant was deleted before, or has a child that is not.
            InvalidRequestError: the grace is negative or longer than ten years.

        Other errors as :meth:`suspend`.
        """
        grace = self._delete_grace if grace is None else grace
        if not dt.timedelta(0) <= grace <= DELETE_GRACE_MAX:
            raise InvalidRequestError(f"a grace period has 0 to {DELETE_GRACE_MAX.days} days")
        until = dt.datetime.now(dt.UTC) + grace
        return await self._change(
            tenant_id, "tenant.deleted",
            lambda t: replace(t, status=TenantStatus.DELETED, erase_after=until, restored_as=t.status),
            actor, request_id, check=tenant_store.deletable,
        )  # fmt: skip

    async def restore(
        self, tenant_id: TenantId, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Tenant:
        """Undo :meth:`delete`: the tenant is as it was, active or suspended.

        Raises:
            ConflictError: the tenant is not deleted, its grace period is over, or its parent is deleted.

        Other errors as :meth:`suspend`.
        """
        return await self._change(
            tenant_id, "tenant.restored",
            lambda t: replace(t, status=t.restored_as or t.status, erase_after=None, restored_as=None),
            actor, request_id, check=tenant_store.restorable,
        )  # fmt: skip

    async def erasable(self, directory: TenantDirectory) -> list[Tenant]:
        """The deleted tenants whose grace period is over, and that of all under them, as far as ``directory`` knows.

        Children first. Nothing erases them by itself; see :class:`~settler_streams.services.erasure.ErasureService`.
        """
        return await tenant_lists.erasable(directory, self.get)

    async def children(
        self,
        tenant_id: TenantId,
        *,
        after: TenantId | None = None,
        limit: int = 100,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> list[Tenant]:
        """The tenants directly under one, by id; the deleted too, until their erasure begins. Who looked is audited.

        Raises:
            InvalidRequestError: ``limit`` is not between 1 and :data:`CHILDREN_MAX`.
            NotFoundError: there is no such tenant.
        """
        if not 1 <= limit <= CHILDREN_MAX:
            raise InvalidRequestError(f"an answer has 1 to {CHILDREN_MAX} children")
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.read(tx, tenant_id)
            found = await tenant_store.children(tx, tenant_id, after, limit)
            await audit.record(
                tx, tenant_id, "tenant.children-listed", f"tenant/{tenant_id}",
                after={"children": [child.id for child in found]}, actor=actor, request_id=request_id,
            )  # fmt: skip
        return found

    async def get(self, tenant_id: TenantId) -> Tenant:
        """The tenant as stored.

        Raises:
            NotFoundError: there is no such tenant.
        """
        async with self._pool.tenant(tenant_id) as tx:
            return await tenant_store.read(tx, tenant_id)

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
        *,
        check: tenant_store.Check = tenant_store.undeleted,
    ) -> Tenant:
        """1. Lock the row; 2. write the next version; 3. audit and outbox; 4. commit; 5. wait for admission."""
        with self._acknowledgements.expect(tenant_id) as awaited:
            with taken(f"tenant {tenant_id} contradicts another", of="tenant"):
                async with self._pool.tenant(tenant_id) as tx:
                    before = await tenant_store.hold(tx, tenant_id)
                    await check(tx, before)
                    after = await tenant_store.store(tx, before, change(before), action, actor, request_id)
            await self._acknowledged(after, awaited)
        return after

    async def _acknowledged(self, tenant: Tenant, awaited: Awaited) -> None:
        self._relay.nudge()
        if self._copies is not None:
            await self._copies.invalidate(tenant.id, tenant.version)
        try:
            await awaited.wait(tenant.version)
        except UnavailableError as error:
            raise TenantNotYetKnownError(tenant, str(error)) from error
