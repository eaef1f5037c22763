"""All tenants, page by page: ids from the directory, rows as stored, and those that are gone left out."""

from __future__ import annotations

import pytest

from settler_streams.errors import InvalidRequestError
from settler_streams.events import TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import Tenant, list_tenants
from tests.services_layer.platform import Platform
from tests.services_layer.test_tenant_backups import remove
from tests.services_layer.test_tenant_life import known_as

pytestmark = pytest.mark.services


class Counted:
    """Reads rows, and knows which."""

    def __init__(self, platform: Platform) -> None:
        self.ids: list[TenantId] = []
        self._get = platform.tenants.get

    async def __call__(self, tenant_id: TenantId) -> Tenant:
        self.ids.append(tenant_id)
        return await self._get(tenant_id)


async def made(platform: Platform, *tiers: TenantTier) -> list[Tenant]:
    """New tenants in the order of their ids, which the directory knows."""
    tenants = [(await platform.new_tenant(tier)).tenant for tier in tiers]
    await known_as(platform, tenants[-1])
    return tenants


async def test_pages_hold_every_tenant_once_by_id_and_read_no_row_beyond_them(platform: Platform) -> None:
    first, *tenants = await made(platform, *[TenantTier.STARTER] * 6)
    read = Counted(platform)
    pages, after = list[list[Tenant]](), first.id
    while page := await list_tenants(platform.directory, read, after=after, limit=2):
        pages.append(page)
        after = page[-1].id
        assert read.ids == [tenant.id for each in pages for tenant in each]
    assert pages == [tenants[:2], tenants[2:4], tenants[4:]]
    assert [t for t in await list_tenants(platform.directory, platform.tenants.get) if t in tenants] == tenants
    for wrong in (0, 1_001):
        with pytest.raises(InvalidRequestError, match="1 to 1000"):
            await list_tenants(platform.directory, platform.tenants.get, limit=wrong)


async def test_only_those_of_a_status_and_a_tier_are_listed(platform: Platform) -> None:
    first, *tenants = await made(platform, *[TenantTier.STARTER, TenantTier.GROWTH] * 2, TenantTier.GROWTH)
    suspended = await platform.tenants.suspend(tenants[0].id)
    await known_as(platform, suspended)
    growth = [suspended, *tenants[2:]]

    async def listed(
        status: TenantStatus | None = None, tier: TenantTier | None = None, limit: int = 100
    ) -> list[Tenant]:
        read = Counted(platform)
        found = await list_tenants(platform.directory, read, after=first.id, limit=limit, status=status, tier=tier)
        assert read.ids == [tenant.id for tenant in found]
        return found

    assert await listed(tier=TenantTier.GROWTH) == growth
    assert await listed(tier=TenantTier.GROWTH, limit=2) == growth[:2]
    assert await listed(status=TenantStatus.SUSPENDED) == [suspended]
    assert await listed(TenantStatus.ACTIVE, TenantTier.GROWTH) == growth[1:]
    assert await listed(TenantStatus.SUSPENDED, TenantTier.STARTER) == []


async def test_what_is_gone_makes_no_page_shorter_and_what_is_shown_is_the_row(platform: Platform) -> None:
    first, gone, changed, last = await made(platform, *[TenantTier.STARTER] * 4)
    await remove(platform.settings, gone.id)
    assert platform.directory.get(gone.id) is not None

    async def suspended_meanwhile(tenant_id: TenantId) -> Tenant:
        if tenant_id == changed.id:
            return await platform.tenants.suspend(tenant_id)
        return await platform.tenants.get(tenant_id)

    page = await list_tenants(platform.directory, platform.tenants.get, after=first.id, limit=2)
    assert page == [changed, last]
    page = await list_tenants(platform.directory, suspended_meanwhile, after=first.id, limit=2)
    assert [(tenant.id, tenant.status) for tenant in page] == [
        (changed.id, TenantStatus.SUSPENDED), (last.id, TenantStatus.ACTIVE),
    ]  # fmt: skip
    await known_as(platform, await platform.tenants.reactivate(changed.id))
    page = await list_tenants(
        platform.directory, suspended_meanwhile, after=first.id, limit=2, status=TenantStatus.ACTIVE
    )
    assert page == [last], "the directory has it as active, the row has not"
