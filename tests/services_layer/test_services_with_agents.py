"""The services together with the flags agent and the recorder: what goes in comes out where a service reads it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from settler_streams.core.flags import FlagReason
from settler_streams.events import QuotaType, Resource, UsageRecorded
from settler_streams.services import FeatureFlagService, QuotaService
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform, running_role, settled

pytestmark = pytest.mark.services


@pytest_asyncio.fixture(scope="module")
async def agents(platform: Platform) -> AsyncIterator[None]:
    async with (
        running_role("flags", platform.settings),
        running_role("recorder", platform.settings, platform.pool),
    ):
        yield


async def _until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask the database until ``holds()``."""
    async with asyncio.timeout(SETTLED_WITHIN_S):
        while not await holds():
            pass


async def test_a_flag_is_set_killed_and_revived(platform: Platform, agents: None) -> None:
    flags = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await flags.start()
    try:
        tenant = (await platform.new_tenant()).tenant
        await platform.directory.find(tenant.id)
        user_id = str(uuid.uuid4())

        async def answers(enabled: bool, reason: FlagReason) -> None:
            await settled(
                flags.feed,
                lambda: (a := flags.evaluate("dark-mode", tenant.id)).enabled is enabled and a.reason is reason,
            )

        await flags.set_flag("dark-mode", tenant.id, actor="tester")
        await answers(True, FlagReason.STATIC)
        await flags.kill("dark-mode", actor="tester", reason="for everyone")
        await answers(False, FlagReason.KILLED)
        await flags.revive("dark-mode", actor="tester", reason="again")
        await answers(True, FlagReason.STATIC)
        await flags.set_flag("dark-mode", tenant.id, actor="tester", user_id=user_id, enabled=False)
        await settled(flags.feed, lambda: not flags.evaluate("dark-mode", tenant.id, user_id).enabled)
        assert await flags.is_enabled("dark-mode", tenant.id)

        async def audited() -> bool:
            async with platform.pool.tenant(tenant.id) as tx:
                rows = await tx.fetch("SELECT actor FROM audit_logs WHERE action LIKE 'flag.%'")
                own = await tx.fetchval("SELECT count(*) FROM feature_flags WHERE tenant_id = $1", tenant.id)
            return [row["actor"] for row in rows] == ["tester", "tester"] and own == 2

        await _until(audited)
    finally:
        await flags.stop()


async def test_recorded_usage_is_what_a_quota_check_sees(platform: Platform, agents: None) -> None:
    service = QuotaService(platform.pool)
    tenant = (await platform.new_tenant(quotas={QuotaType.STORAGE: 1000})).tenant
    await platform.publisher.publish(
        "usage-events", tenant.id, tenant.id, UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=900)
    )

    async def seen() -> bool:
        return (await service.check_quota(tenant.id, QuotaType.STORAGE, 0)).current_usage == 900

    await _until(seen)
    assert await service.check_quota(tenant.id, QuotaType.STORAGE, 101) == (False, 900, 1000)
    for quota in QuotaType:
        check = await service.check_quota(tenant.id, quota, 0)
        assert check.allowed, quota
        assert check.limit > 0
