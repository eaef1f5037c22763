"""The tenant cache with the services around it: a change reaches Valkey by its call, and by its event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import pytest_asyncio
import redis.asyncio

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey import tenant_cache
from settler_streams.errors import NotFoundError
from settler_streams.events import QuotaType, TenantStatus, TenantTier
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import QuotaService, TenantConfigurations, TenantService
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", SETTLED_WITHIN_S)


@pytest_asyncio.fixture
async def configurations(platform: Platform) -> AsyncIterator[TenantConfigurations]:
    async with TenantConfigurations.connect(platform.settings, platform.pool) as configurations:
        yield configurations


def _hits() -> float:
    return METRICS.registry.get_sample_value("settler_tenant_cache_total", {"outcome": "hit"}) or 0.0


async def _version_in_valkey(platform: Platform, tenant_id: TenantId, version: int) -> None:
    key = f"{platform.settings.deployment}:tenant:{{{tenant_id}}}"
    async with (
        aclosing(redis.asyncio.Redis.from_url(platform.settings.redis_url())) as client,
        asyncio.timeout(SETTLED_WITHIN_S),
    ):
        while await client.hget(key, "v") != str(version).encode():
            pass


async def test_every_kind_of_change_is_read_once_its_event_has_arrived(
    platform: Platform, configurations: TenantConfigurations
) -> None:
    tenant = (await platform.new_tenant()).tenant
    await _version_in_valkey(platform, tenant.id, 1)
    assert await configurations.read(tenant.id) == tenant
    for change in (
        platform.tenants.change_tier(tenant.id, TenantTier.SCALE),
        platform.tenants.change_quotas(tenant.id, {QuotaType.STORAGE: 7}),
        platform.tenants.suspend(tenant.id),
        platform.tenants.reactivate(tenant.id),
    ):
        changed = await change
        await _version_in_valkey(platform, tenant.id, changed.version)  # only the event tells it here
        assert await configurations.read(tenant.id) == changed
        before = _hits()
        assert await configurations.read(tenant.id) == changed
        assert _hits() == before + 1


async def test_a_change_by_a_service_that_knows_the_copies_is_read_at_once(platform: Platform) -> None:
    async with (
        TenantService.connect(platform.settings) as service,
        TenantConfigurations.connect(platform.settings, platform.pool) as configurations,
    ):
        tenant = (await platform.new_tenant()).tenant
        for n in range(1, 20):
            await configurations.read(tenant.id)
            changed = await service.change_quotas(tenant.id, {QuotaType.STORAGE: n})
            assert (await configurations.read(tenant.id)).version == changed.version


async def test_quotas_from_the_cache_are_those_of_the_rows(platform: Platform) -> None:
    plain = QuotaService(platform.pool)
    async with QuotaService.connect(platform.settings) as cached:
        root = (await platform.new_tenant(quotas={QuotaType.STORAGE: 100})).tenant
        child = (await platform.new_tenant(parent_id=root.id)).tenant
        enterprise = (await platform.new_tenant(TenantTier.ENTERPRISE, parent_id=root.id)).tenant
        for tenant in (root, child, enterprise):
            await _version_in_valkey(platform, tenant.id, 1)
            for quota in QuotaType:
                for amount in (0, 100, 101, 10**15):
                    expected = await plain.check_quota(tenant.id, quota, amount)
                    assert await cached.check_quota(tenant.id, quota, amount) == expected
        with pytest.raises(NotFoundError):
            await cached.check_quota(TenantId(uuid7(1)), QuotaType.STORAGE, 1)


async def test_a_process_that_starts_later_knows_what_was_changed_before(platform: Platform) -> None:
    """Valkey comes back with what it had before the change; the new process has heard of the change all the same."""
    tenant = (await platform.new_tenant()).tenant
    key = f"{platform.settings.deployment}:tenant:{{{tenant.id}}}"
    async with aclosing(redis.asyncio.Redis.from_url(platform.settings.redis_url())) as client:
        async with TenantConfigurations.connect(platform.settings, platform.pool) as before:
            await before.read(tenant.id)
            await before.read(tenant.id)
            copy = await client.dump(key)
            suspended = await platform.tenants.suspend(tenant.id)
        await client.restore(key, 300_000, copy, replace=True)
    async with TenantConfigurations.connect(platform.settings, platform.pool) as after:
        found = await after.read(tenant.id)
    assert (found.version, found.status) == (suspended.version, TenantStatus.SUSPENDED)
