"""The directory of tenants: what every process needs to know of each, kept in memory from ``tenant-changes``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from settler_streams.core.quotas import Tenant
from settler_streams.errors import NotFoundError
from settler_streams.events import Envelope, Part, TenantChanged, TenantErased
from settler_streams.ids import TenantId
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings

CHAIN_DEPTH_MAX = 8
"""Levels from a tenant to its root, itself included."""
KNOWN_WITHIN_S = 5.0
"""A tenant that was just created appears within milliseconds; one that has not by then does not exist."""
WAITING_MAX = 1_000
"""Callers that may wait for an unknown tenant at a time; the next one is told at once that it is not known."""

OnChange = Callable[[TenantId, int], None]
"""Told each version of a tenant that is new to the directory."""


class TenantDirectory:
    """Every tenant by id, as of its newest version that has arrived here. One per process.

    Of an erased tenant it keeps the id alone.
    """

    def __init__(self, settings: Settings) -> None:
        self._tenants: dict[TenantId, Tenant] = {}
        self._erased: set[TenantId] = set()
        self._waiting: dict[TenantId, list[asyncio.Future[Tenant]]] = {}
        self._waiting_count = 0
        self._followers: list[OnChange] = []
        self.feed = TopicFeed(settings, "tenant-changes", self._changed, start="beginning")

    async def start(self) -> None:
        """Load every tenant, then keep up. Raises UnavailableError as :meth:`TopicFeed.start`."""
        await self.feed.start()

    async def stop(self) -> None:
        """Stop keeping up."""
        await self.feed.stop()

    def __len__(self) -> int:
        return len(self._tenants)

    def __iter__(self) -> Iterator[TenantId]:
        return iter(tuple(self._tenants))

    @property
    def erased(self) -> frozenset[TenantId]:
        """The tenants that were erased, or are being erased."""
        return frozenset(self._erased)

    def is_erased(self, tenant_id: TenantId) -> bool:
        """Whether nothing of the tenant is to be shown any more."""
        return tenant_id in self._erased

    @property
    def stale(self) -> bool:
        """Whether changes may have been missed lately, see :attr:`TopicFeed.stale`."""
        return self.feed.stale

    def follow(self, on_change: OnChange) -> None:
        """Call ``on_change`` for every change from here on, right after the directory has it."""
        self._followers.append(on_change)

    def unfollow(self, on_change: OnChange) -> None:
        """Undo :meth:`follow`."""
        self._followers.remove(on_change)

    def get(self, tenant_id: TenantId) -> Tenant | None:
        """The tenant, or None while it is not known here."""
        return self._tenants.get(tenant_id)

    async def find(self, tenant_id: TenantId) -> Tenant:
        """The tenant; waits for one that was created a moment ago.

        Raises:
            NotFoundError: it is not known within :data:`KNOWN_WITHIN_S`, or was erased.
        """
        if (tenant := self._tenants.get(tenant_id)) is not None:
            return tenant
        if tenant_id in self._erased or self._waiting_count >= WAITING_MAX:
            raise NotFoundError(f"no tenant {tenant_id}")
        future: asyncio.Future[Tenant] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(tenant_id, [])
        waiting.append(future)
        self._waiting_count += 1
        try:
            async with asyncio.timeout(KNOWN_WITHIN_S):
                return await future
        except TimeoutError as error:
            raise NotFoundError(f"no tenant {tenant_id}") from error
        finally:
            self._waiting_count -= 1
            waiting.remove(future)
            if not waiting and self._waiting.get(tenant_id) is waiting:
                del self._waiting[tenant_id]

    def chain(self, tenant_id: TenantId) -> tuple[TenantId, ...]:
        """The tenant and its parents up to the root, as far as they are known here."""
        chain = [tenant_id]
        while len(chain) < CHAIN_DEPTH_MAX:
            tenant = self._tenants.get(chain[-1])
            if tenant is None or tenant.parent_id is None:
                break
            chain.append(tenant.parent_id)
        return tuple(chain)

    def _changed(self, event: Envelope[Part]) -> None:
        changed = event.data
        if isinstance(changed, TenantErased):
            self._forget(event.tenantid, changed.version)
            return
        if not isinstance(changed, TenantChanged) or event.tenantid in self._erased:
            return
        current = self._tenants.get(event.tenantid)
        if current is not None and current.version >= changed.version:
            return
        tenant = self._tenants[event.tenantid] = Tenant(
            changed.version,
            changed.tier,
            changed.status,
            TenantId(changed.root_id),
            TenantId(changed.parent_id) if changed.parent_id else None,
            dict(changed.quotas),
            changed.burst,
        )
        for on_change in self._followers:
            on_change(event.tenantid, changed.version)
        for future in self._waiting.pop(event.tenantid, ()):
            if not future.done():
                future.set_result(tenant)

    def _forget(self, tenant_id: TenantId, version: int) -> None:
        self._tenants.pop(tenant_id, None)
        self._erased.add(tenant_id)
        for on_change in self._followers:
            on_change(tenant_id, version)
        for future in self._waiting.pop(tenant_id, ()):
            if not future.done():
                future.set_exception(NotFoundError(f"no tenant {tenant_id}"))
