"""A tenant's standing with its quotas: its own figures alone, read through Valkey, and from Postgres without it."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import httpx
import pytest

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey import tenant_cache
from settler_streams.core.quotas import month_bounds
from settler_streams.events import QuotaType, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import QuotaService, Scope, TenantService
from settler_streams.tiers import load_tiers
from tests.gateway.gateways import Keyed, keyed, running_gateway
from tests.services.interface import Service
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform

pytestmark = pytest.mark.services

PATH = "/v1/quotas"
FREE = load_tiers()[TenantTier.FREE].limits()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's Valkey may take longer than a gateway would wait for it."""
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", SETTLED_WITHIN_S)


async def _standings(tenant: Keyed) -> dict[str, Any]:
    answer = await tenant.http.get(PATH)
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert [item["quota"] for item in items] == list(QuotaType)
    return {item["quota"]: item for item in items}


async def _use(platform: Platform, tenant_id: TenantId, quota: QuotaType, used: int, window: str | None = None) -> None:
    """As the recorder writes it; ``window`` is how long it still goes on."""
    async with platform.pool.tenant(tenant_id) as tx:
        await tx.execute(
            "INSERT INTO tenant_quota_usage (tenant_id, quota_type, used, window_end, source_version) "
            "VALUES ($1, $2, $3, now() + $4::text::interval, 1)",
            tenant_id, quota.value, used, window,
        )  # fmt: skip


async def _set_behind_its_back(platform: Platform, tenant_id: TenantId, storage: int) -> None:
    """A row that nobody has been told of: whoever shows it has asked Postgres, whoever does not has not."""
    async with platform.pool.tenant(tenant_id) as tx:
        await tx.execute(
            "UPDATE tenants SET quotas = jsonb_build_object('storage', $2::bigint) WHERE id = $1", tenant_id, storage
        )


def _hits() -> float:
    return METRICS.registry.get_sample_value("settler_tenant_cache_total", {"outcome": "hit"}) or 0.0


async def _read_through_valkey(tenant: Keyed) -> None:
    """Until it has heard of the tenant's last change, a gateway asks Postgres, or may not keep what it has read."""
    async with asyncio.timeout(SETTLED_WITHIN_S):
        before = _hits()
        while _hits() == before:
            await _standings(tenant)


async def test_each_quota_has_its_limit_use_and_window(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url, TenantTier.FREE, quotas={QuotaType.STORAGE: 1000}) as tenant:
        await _use(platform, tenant.id, QuotaType.STORAGE, 900)
        await _use(platform, tenant.id, QuotaType.MONTHLY_RECONCILIATIONS, 7, "1 day")
        await _use(platform, tenant.id, QuotaType.CUSTOM_DOMAINS, 3, "-1 day")  # of a window that has ended
        before_ms = int(dt.datetime.now(dt.UTC).timestamp() * 1000)
        found = await _standings(tenant)
        after_ms = int(dt.datetime.now(dt.UTC).timestamp() * 1000)
    month_end = dt.datetime.fromisoformat(found["monthly_reconciliations"].pop("window_ends_at"))
    assert month_end.timestamp() * 1000 in {month_bounds(at_ms)[1] for at_ms in (before_ms, after_ms)}
    expected = {quota: {"quota": quota, "used": 0, "limit": FREE[quota], "bound_by": "tenant"} for quota in QuotaType}
    expected[QuotaType.STORAGE] |= {"used": 900, "limit": 1000}
    expected[QuotaType.MONTHLY_RECONCILIATIONS] |= {"used": 7}
    expected[QuotaType.RATE_LIMIT] |= {"limit": load_tiers()[TenantTier.FREE].burst, "per_minute": FREE["rate_limit"]}
    assert found == expected


async def test_a_child_learns_only_that_a_parent_binds_it(platform: Platform, gateway_url: str) -> None:
    root = (await platform.new_tenant(TenantTier.SCALE, quotas={QuotaType.STORAGE: 7_001})).tenant
    parent = (await platform.new_tenant(TenantTier.SCALE, parent_id=root.id)).tenant
    async with (
        keyed(platform, gateway_url, TenantTier.FREE, parent_id=parent.id, quotas={QuotaType.STORAGE: 50}) as child,
        keyed(platform, gateway_url, TenantTier.FREE, parent_id=parent.id) as sibling,
        keyed(platform, gateway_url, TenantTier.ENTERPRISE, parent_id=parent.id) as enterprise,
        keyed(platform, gateway_url, TenantTier.FREE, quotas={QuotaType.STORAGE: 6_001}) as stranger,
    ):
        await _use(platform, root.id, QuotaType.STORAGE, 6_991)
        await _use(platform, child.id, QuotaType.STORAGE, 8)
        await _use(platform, sibling.id, QuotaType.STORAGE, 6_983)
        found = await _standings(child)
        # 42 of its own are left, and 10 of the root's: of the root nothing but that is said.
        assert found["storage"] == {"quota": "storage", "used": 8, "limit": 50, "bound_by": "parent"}
        assert {item["bound_by"] for quota, item in found.items() if quota != "storage"} == {"tenant"}
        text = (await child.http.get(PATH)).text
        others = (root, parent, sibling, enterprise, stranger)
        for foreign in (*(other.id for other in others), root.name, root.slug, "7001", "6991", "6983", "6001"):
            assert foreign not in text
        assert {item["bound_by"] for item in (await _standings(enterprise)).values()} == {None}
        assert (await _standings(stranger))["storage"]["limit"] == 6_001


async def test_a_key_without_the_scope_is_refused_and_the_http_policy_holds(
    platform: Platform, gateway_url: str
) -> None:
    async with httpx.AsyncClient(base_url=gateway_url) as nobody:
        refused = await nobody.get(PATH)
        assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
    async with keyed(platform, gateway_url, scopes=[Scope.JOBS_WRITE, Scope.FLAGS_READ]) as tenant:
        refused = await tenant.http.get(PATH)
        assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
    async with keyed(platform, gateway_url, TenantTier.FREE, quotas={QuotaType.RATE_LIMIT: 1}) as tenant:
        assert (await tenant.http.get(PATH)).headers["ratelimit"] == '"http";r=9'
        async with asyncio.timeout(SETTLED_WITHIN_S):
            while (refused := await tenant.http.get(PATH)).status_code == 200:
                pass
        assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["http"])


async def test_a_suspended_tenant_reads_and_one_that_is_gone_does_not(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        await platform.tenants.suspend(tenant.id)
        assert (await tenant.http.get(PATH)).status_code == 200
        await platform.tenants.delete(tenant.id)
        assert (await tenant.http.get(PATH)).status_code == 401


async def test_a_second_request_reads_the_tenant_from_valkey(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url, quotas={QuotaType.STORAGE: 5}) as tenant:
        await _read_through_valkey(tenant)
        await _set_behind_its_back(platform, tenant.id, 6)
        before = _hits()
        assert (await _standings(tenant))["storage"]["limit"] == 5
        assert _hits() == before + 1


async def test_the_request_after_a_change_sees_it(platform: Platform, gateway_url: str) -> None:
    """Each change returns once Valkey has dropped what it had, whether or not its event has arrived at the gateway."""
    async with TenantService.connect(platform.settings) as service, keyed(platform, gateway_url) as tenant:
        await _read_through_valkey(tenant)
        for storage in range(1, 6):
            await _standings(tenant)
            await service.change_quotas(tenant.id, {QuotaType.STORAGE: storage})
            assert (await _standings(tenant))["storage"]["limit"] == storage
        for tier in (TenantTier.SCALE, TenantTier.FREE):
            await service.change_tier(tenant.id, tier)
            found = (await _standings(tenant))["concurrent_jobs"]
            assert found["limit"] == load_tiers()[tier].concurrent_jobs
        await _read_through_valkey(tenant)  # what it has seen it has not seen for want of a cache


async def test_without_valkey_the_answer_comes_from_postgres(platform: Platform, valkey: Service) -> None:
    async with (
        running_gateway(platform.settings) as (url, _),
        keyed(platform, url, TenantTier.ENTERPRISE, quotas={QuotaType.STORAGE: 5}) as tenant,  # without an HTTP limit
    ):
        await _read_through_valkey(tenant)
        await _set_behind_its_back(platform, tenant.id, 6)
        assert (await _standings(tenant))["storage"]["limit"] == 5
        valkey.stop()
        try:
            assert (await _standings(tenant))["storage"]["limit"] == 6
            # It needs no Valkey to begin with, nor to be ready, for which this waits.
            async with running_gateway(platform.settings) as (other, _), httpx.AsyncClient(base_url=other) as late:
                authorised = {"Authorization": f"Bearer {tenant.key}"}
                assert (await late.get(PATH, headers=authorised)).status_code == 200
        finally:
            valkey.start()


async def test_the_standing_is_that_of_a_check(platform: Platform, gateway_url: str) -> None:
    """Both read the same levels. A check tells what a parent uses, which is why nobody shows it to a tenant."""
    root = (await platform.new_tenant(quotas={QuotaType.STORAGE: 20})).tenant
    async with keyed(platform, gateway_url, parent_id=root.id, quotas={QuotaType.STORAGE: 100}) as child:
        await _use(platform, root.id, QuotaType.STORAGE, 15)
        assert await QuotaService(platform.pool).check_quota(child.id, QuotaType.STORAGE, 6) == (False, 15, 20)
        item = (await _standings(child))["storage"]
        assert (item["used"], item["limit"], item["bound_by"]) == (0, 100, "parent")
