"""A tenant's row: read, written with its next version, and told to the audit log and to Kafka in one transaction."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from settler_streams.adapters.postgres import outbox
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.events import QuotaType, TenantChanged, TenantStatus, TenantTier, encode, envelope
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import audit, queries
from settler_streams.services.directory import CHAIN_DEPTH_MAX

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

SOURCE = "/tenant-service"
VALUE_FORMAT = 1
"""The format of a tenant in Valkey, see :mod:`.tenant_configurations`; a format reads only its own values."""
CHILDREN_PAGE = 100
"""Children whose rows are read at a time, each in its own context: some tens of milliseconds."""

Check = Callable[["Transaction", "Tenant"], Awaitable[None]]
"""Refuses a change that the tenant's present state does not allow, by raising."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as stored. ``quotas`` overrides the tier's limits; ``version`` grows by one with every change.

    ``erase_after`` is set while the tenant is deleted; ``restored_as`` is then the status that it had before.
    """

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
    erase_after: dt.datetime | None = None
    restored_as: TenantStatus | None = None


def unchanged(before: Tenant, after: Tenant) -> bool:
    """Whether both are stored alike. The configurations are compared as JSON: to Python, 1, 1.0 and true are equal."""
    first, second = (json.dumps(each.config, sort_keys=True) for each in (before, after))
    return before == after and first == second


async def read(tx: Transaction, tenant_id: TenantId, query: str = queries.READ_TENANT) -> Tenant:
    """The tenant in whose context the transaction is.

    Raises:
        NotFoundError: there is no such tenant.
    """
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
        erase_after=row["erase_after"],
        restored_as=TenantStatus(row["restored_as"]) if row["restored_as"] else None,
    )


async def hold(tx: Transaction, tenant_id: TenantId) -> Tenant:
    """The tenant, which nobody else changes until the transaction ends; rows that refer to it still come and go.

    Raises:
        NotFoundError: there is no such tenant.
    """
    return await read(tx, tenant_id, queries.LOCK_TENANT)


async def lock(tx: Transaction, tenant_id: TenantId) -> Tenant:
    """As :func:`hold`, of a tenant that is not deleted.

    Raises:
        NotFoundError: there is no such tenant.
        ConflictError: the tenant was deleted.
    """
    tenant = await hold(tx, tenant_id)
    require_undeleted(tenant)
    return tenant


def require_undeleted(tenant: Tenant) -> None:
    """Refuse a tenant that was deleted, with :class:`ConflictError`."""
    if tenant.status is TenantStatus.DELETED:
        raise ConflictError(f"tenant {tenant.id} was deleted")


async def root_under(tx: Transaction, parent_id: TenantId) -> TenantId:
    """The root of a new child of ``parent_id``. Each level is read in its own context; the audit entry names it.

    The parent is locked, so that it is not deleted while it gets a child.

    Raises:
        InvalidRequestError: a level is not active, or the hierarchy would be too deep.
        NotFoundError: there is no such parent.
    """
    depth = 1
    level: TenantId | None = parent_id
    root_id = parent_id
    while level is not None:
        depth += 1
        if depth > CHAIN_DEPTH_MAX:
            raise InvalidRequestError(f"a hierarchy has at most {CHAIN_DEPTH_MAX} levels")
        await TenantContext.set(tx, level)
        tenant = await read(tx, level, queries.SHARE_TENANT if level == parent_id else queries.READ_TENANT)
        if tenant.status is not TenantStatus.ACTIVE:
            raise InvalidRequestError(f"tenant {level} is {tenant.status}: it cannot have a new child")
        root_id, level = tenant.root_id, tenant.parent_id
    return root_id


async def children(tx: Transaction, tenant_id: TenantId, after: TenantId | None, limit: int) -> list[Tenant]:
    """The next children by id, each read in its own context; the transaction is in the parent's again afterwards.

    Those whose erasure has begun are passed over. Fewer than ``limit`` are the last ones.
    """
    found: list[Tenant] = []
    while len(found) < limit:
        rows = await tx.fetch(queries.CHILDREN_AFTER, tenant_id, after, limit - len(found))
        if not rows:
            break
        for row in rows:
            after = TenantId(str(row["child_id"]))
            if await TenantContext.open(tx, after):
                found.append(await read(tx, after))
        await TenantContext.set(tx, tenant_id)
    return found


async def refuse_living_children(tx: Transaction, tenant: Tenant) -> None:
    """Whoever has the tenant locked can count on the answer: a child is made and restored under the parent's lock.

    A child that is being erased was deleted, and no way leads back.

    Raises:
        ConflictError: a child is not deleted.
    """
    after: TenantId | None = None
    while page := await children(tx, tenant.id, after, CHILDREN_PAGE):
        for child in page:
            if child.status is not TenantStatus.DELETED:
                raise ConflictError(f"tenant {tenant.id} has a child, {child.id} ({child.slug}); delete that first")
        after = page[-1].id


async def refuse_dead_parent(tx: Transaction, tenant: Tenant) -> None:
    """The parent stays locked, so that it is not deleted before the transaction ends.

    Raises:
        ConflictError: the parent was deleted.
    """
    if tenant.parent_id is None:
        return
    await TenantContext.set(tx, tenant.parent_id)
    parent = await read(tx, tenant.parent_id, queries.SHARE_TENANT)
    await TenantContext.set(tx, tenant.id)
    if parent.status is TenantStatus.DELETED:
        raise ConflictError(f"the parent of tenant {tenant.id}, {parent.id}, was deleted; restore that first")


async def undeleted(_tx: Transaction, tenant: Tenant) -> None:
    """Most changes need no more than a tenant that is there.

    Raises:
        ConflictError: the tenant was deleted.
    """
    require_undeleted(tenant)


def at_version(version: int | None) -> Check:
    """As :func:`undeleted`; and no other change may have come in between."""

    async def check(_tx: Transaction, tenant: Tenant) -> None:
        require_undeleted(tenant)
        if version is not None and tenant.version != version:
            raise ConflictError(f"tenant {tenant.id} has version {tenant.version}, not {version}; read it again")

    return check


async def deletable(tx: Transaction, tenant: Tenant) -> None:
    """A tenant can be deleted once, and not before its children.

    Raises:
        ConflictError: it was deleted, or has a child that is not.
    """
    require_undeleted(tenant)
    await refuse_living_children(tx, tenant)


async def restorable(tx: Transaction, tenant: Tenant) -> None:
    """A deleted tenant can be restored within its grace period, and not before its parent.

    Raises:
        ConflictError: it is not deleted, its grace period is over, or its parent is deleted.
    """
    if tenant.erase_after is None:
        raise ConflictError(f"tenant {tenant.id} is not deleted")
    if tenant.erase_after <= dt.datetime.now(dt.UTC):
        raise ConflictError(f"tenant {tenant.id} could be restored until {tenant.erase_after:%Y-%m-%d %H:%M:%S} UTC")
    await refuse_dead_parent(tx, tenant)


async def insert(tx: Transaction, tenant: Tenant) -> None:
    """A new row, and for a child one that its parent knows it by."""
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
    if tenant.parent_id is not None:
        await TenantContext.set(tx, tenant.parent_id)
        await tx.execute(queries.INSERT_CHILD, tenant.parent_id, tenant.id)
        await TenantContext.set(tx, tenant.id)


async def update(tx: Transaction, tenant: Tenant) -> None:
    """Everything of a tenant that can change."""
    await tx.execute(
        queries.UPDATE_TENANT,
        tenant.id,
        tenant.tier.value,
        tenant.status.value,
        json.dumps(tenant.quotas),
        tenant.version,
        tenant.name,
        json.dumps(tenant.config),
        tenant.erase_after,
        tenant.restored_as.value if tenant.restored_as else None,
    )


async def store(
    tx: Transaction, before: Tenant, after: Tenant, action: str, actor: str, request_id: str | None
) -> Tenant:
    """The next version, audited and announced; what changes nothing is no version and only announced again.

    Its first announcement may not have been acknowledged yet, and whoever repeats a change waits for that.
    """
    if unchanged(before, after):
        await _announce(tx, before)
        return before
    after = replace(after, version=before.version + 1)
    await update(tx, after)
    await record(tx, after, before, action, actor, request_id)
    return after


async def record(
    tx: Transaction, after: Tenant, before: Tenant | None, action: str, actor: str, request_id: str | None
) -> None:
    """The audit entry and the outbox entry of a change; both carry the id of the event."""
    event_id = await _announce(tx, after)
    await audit.record(
        tx, after.id, action, f"tenant/{after.id}", before=audited(before) if before else None, after=audited(after),
        actor=actor, request_id=request_id, entry_id=event_id,
    )  # fmt: skip


async def record_owned(
    tx: Transaction,
    tenant_id: TenantId,
    action: str,
    subject: str,
    *,
    before: audit.Audited | None = None,
    after: audit.Audited | None = None,
    actor: str,
    request_id: str | None,
) -> None:
    """As :func:`record`, of a change of something that the tenant has, such as a user or a key: one version more.

    The event says that the tenant has changed and not in what; that is in the audit entry of the event's id. Whoever
    changes what a tenant has locks the tenant first: of two who did so afterwards, each could wait for the other.
    """
    event_id = await _announce(tx, await read(tx, tenant_id, queries.NEXT_VERSION_OF_TENANT))
    await audit.record(
        tx, tenant_id, action, subject, before=before, after=after,
        actor=actor, request_id=request_id, entry_id=event_id,
    )  # fmt: skip


async def _announce(tx: Transaction, tenant: Tenant) -> str:
    """Put the event of the tenant's version into the outbox; returns its id."""
    now = dt.datetime.now(dt.UTC)
    event_id = uuid7(int(now.timestamp() * 1000))
    changed = TenantChanged(
        version=tenant.version,
        slug=tenant.slug,
        tier=tenant.tier,
        status=tenant.status,
        root_id=tenant.root_id,
        parent_id=tenant.parent_id,
        quotas=dict(tenant.quotas),
    )
    event = envelope(changed, event_id=event_id, source=SOURCE, tenant=tenant.id, time=now, subject=tenant.id)
    await outbox.append(tx, tenant.id, "tenant-changes", tenant.root_id, encode(event))
    return event_id


def audited(tenant: Tenant) -> audit.Audited:
    """What the audit log says of a tenant."""
    return {
        "slug": tenant.slug,
        "name": tenant.name,
        "tier": tenant.tier,
        "status": tenant.status,
        "parent_id": tenant.parent_id,
        "version": tenant.version,
        "quotas": dict(tenant.quotas),
        "config": dict(tenant.config),
        "erase_after": tenant.erase_after,
    }
