"""Lists of tenants under whatever parent.

No role of Postgres sees two tenants, so no query lists them: the directory knows their ids, and each row is read by
itself. What the directory has not heard of yet, a matter of milliseconds, is missing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable

from settler_streams.core import quotas
from settler_streams.errors import InvalidRequestError, NotFoundError
from settler_streams.events import TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.tenant_store import Tenant

PAGE_MAX = 1_000
"""Of one answer; the next one starts behind its last. A row is a transaction, of about a millisecond."""

Read = Callable[[TenantId], Awaitable[Tenant]]
"""The tenant as stored, as :meth:`~settler_streams.services.tenants.TenantService.get`."""


async def list_tenants(
    directory: TenantDirectory,
    read: Read,
    *,
    after: TenantId | None = None,
    limit: int = 100,
    status: TenantStatus | None = None,
    tier: TenantTier | None = None,
) -> list[Tenant]:
    """The next tenants as stored, by id, which is in the order of their creation; the deleted are among them.

    Fewer than ``limit`` are the last ones. Rows are read for the page alone, and in vain only where one was erased, or
    changed so that it is not wanted any more, since the directory last heard of it.

    Args:
        directory: of which tenants.
        read: reads a row.
        after: only those behind this id.
        limit: at most so many, 1 to :data:`PAGE_MAX`.
        status: only those that have it.
        tier: only those in it.

    Raises:
        InvalidRequestError: ``limit`` is out of range.
        UnavailableError: Postgres failed.
    """
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequestError(f"an answer has 1 to {PAGE_MAX} tenants")

    def wanted(tenant: Tenant | quotas.Tenant | None) -> bool:
        return tenant is not None and status in (None, tenant.status) and tier in (None, tenant.tier)

    found: list[Tenant] = []
    for tenant_id in sorted(one for one in directory if after is None or one > after):
        if len(found) == limit:
            break
        if not wanted(directory.get(tenant_id)):
            continue
        try:
            tenant = await read(tenant_id)
        except NotFoundError:
            continue  # its erasure has begun
        if wanted(tenant):
            found.append(tenant)
    return found


async def erasable(directory: TenantDirectory, read: Read) -> list[Tenant]:
    """The deleted tenants whose grace period is over, children first; of parents those alone under whom all are."""
    now, found, held_up = dt.datetime.now(dt.UTC), [], set[TenantId]()
    for tenant_id in directory:
        known, chain = directory.get(tenant_id), directory.chain(tenant_id)
        if known is None:
            continue
        if known.status is TenantStatus.DELETED:
            try:
                tenant = await read(tenant_id)
            except NotFoundError:
                continue  # its erasure has begun
            if tenant.erase_after is not None and tenant.erase_after <= now:
                found.append((-len(chain), tenant.id, tenant))
                continue
        held_up.update(chain)
    return [tenant for _, _, tenant in sorted(found, key=lambda one: one[:2]) if tenant.id not in held_up]
