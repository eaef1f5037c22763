"""``settler tenants tier``, ``quotas`` and ``list``: what a tenant may use, changed until admission decides by it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from settler_streams.events import JobDecided, QuotaType
from settler_streams.ids import TenantId
from settler_streams.tiers import load_tiers
from tests.cli.in_process import shown
from tests.cli.test_cli_tenants import REFUSED, Cli, cli, done, new_tenant
from tests.services_layer.platform import Platform
from tests.services_layer.test_tenant_life import audit_of, decision_on_a_job

__all__ = ["cli"]

pytestmark = pytest.mark.services

USAGE = 2
NOBODY = "0190a1b2-c3d4-7e5f-8a6b-9c0d1e2f3a4b"


async def decision(platform: Platform, tenant_id: str) -> JobDecided:
    return await decision_on_a_job(platform, await platform.tenants.get(TenantId(tenant_id)))


async def table(platform: Platform, tmp_path: Path, *arguments: str) -> list[list[str]]:
    """The words of each line."""
    known = {**platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path)}
    printed = await asyncio.to_thread(shown, ["tenants", *arguments], known)
    return [line.split() for line in printed.splitlines()]


def limits(tier: Any, **own: int) -> dict[str, Any]:
    """What `quotas` says of them all."""
    return {
        quota.value: {
            "own": own.get(quota.value), "tier": limit,
            "limit": own.get(quota.value, limit), "holds": "own" if quota.value in own else "tier",
        }
        for quota, limit in load_tiers()[tier].limits().items()
    }  # fmt: skip


async def test_a_tier_is_changed_audited_and_decided_by(cli: Cli, platform: Platform) -> None:
    tenant = await new_tenant(cli, "--tier", "starter", "--quota", "concurrent_jobs=0")
    refused = await decision(platform, tenant["id"])
    assert (refused.admitted, refused.quota, refused.limit) == (False, QuotaType.CONCURRENT_JOBS, 0)
    moved = await done(cli, "tier", tenant["id"], "enterprise")
    assert moved == {**tenant, "tier": "enterprise", "version": 2}
    assert await done(cli, "show", tenant["id"]) == moved
    assert (await decision(platform, tenant["id"])).admitted, "no quota refuses an Enterprise tenant"
    entry = (await audit_of(platform, TenantId(tenant["id"])))[-1]
    assert (entry["actor"], entry["action"]) == ("cli", "tenant.tier-changed")
    assert (entry["before"]["tier"], entry["after"]["tier"]) == ("starter", "enterprise")
    assert await done(cli, "tier", tenant["id"], "enterprise") == moved, "the same again makes no version"
    code, said = await cli("tier", NOBODY, "growth")
    assert (code, f"no tenant {NOBODY}" in said) == (REFUSED, True)
    code, said = await cli("tier", tenant["id"], "platinum")
    assert (code, "'platinum' is not one of" in said) == (USAGE, True)
    assert await done(cli, "show", tenant["id"]) == moved


async def test_limits_are_shown_changed_one_by_one_and_decided_by(cli: Cli, platform: Platform) -> None:
    tenant = (await new_tenant(cli, "--tier", "growth", "--quota", "storage=7", "--quota", "rate_limit=20"))["id"]
    before = {"tenant": tenant, "version": 1, "tier": "growth", "quotas": limits("growth", storage=7, rate_limit=20)}
    assert await done(cli, "quotas", tenant) == before
    changed = await done(
        cli, "quotas", tenant, "--set", "concurrent_jobs=0", "--set", "custom_domains=9", "--unset", "storage"
    )
    own = {"rate_limit": 20, "concurrent_jobs": 0, "custom_domains": 9}
    assert changed == {**before, "version": 2, "quotas": limits("growth", **own)}
    assert await done(cli, "quotas", tenant) == changed
    assert (await done(cli, "show", tenant))["quotas"] == own
    assert (await decision(platform, tenant)).quota is QuotaType.CONCURRENT_JOBS
    await done(
        cli, "quotas", tenant, SETTLER_QUOTAS_SET="storage=1 rate_limit=30", SETTLER_QUOTAS_UNSET="concurrent_jobs"
    )
    assert (await decision(platform, tenant)).admitted
    assert (await done(cli, "quotas", tenant))["quotas"] == limits("growth", storage=1, rate_limit=30, custom_domains=9)
    entries = [entry for entry in await audit_of(platform, TenantId(tenant)) if "quotas" in entry["action"]]
    assert [(entry["actor"], entry["before"]["quotas"], entry["after"]["quotas"]) for entry in entries] == [
        ("cli", {"storage": 7, "rate_limit": 20}, own),
        ("cli", own, {"storage": 1, "rate_limit": 30, "custom_domains": 9}),
    ]


async def test_limits_are_a_table_for_people(cli: Cli, platform: Platform, tmp_path: Path) -> None:
    tenant = (await new_tenant(cli, "--tier", "free"))["id"]
    heading, *lines = await table(platform, tmp_path, "quotas", tenant, "--set", "custom_domains=3")
    assert heading == ["quota", "own", "tier", "limit", "holds"]
    assert ["custom_domains", "3", "0", "3", "own"] in lines
    assert ["concurrent_jobs", "10", "10", "tier"] in lines
    assert len(lines) == len(QuotaType)


@pytest.mark.parametrize(
    ("given", "code", "why"),
    [
        (("--set", "memory=1"), USAGE, "'memory' is not one of 'rate_limit', 'storage'"),
        (("--set", "storage"), USAGE, "gives no whole number, as storage=100 does"),
        (("--set", "storage=1.5"), USAGE, "gives no whole number"),
        (("--unset", "memory"), USAGE, "'memory' is not one of"),
        (("--set", "storage=-1"), REFUSED, "storage=-1 is not"),
        (("--set", f"storage={2**53 + 1}"), REFUSED, f"a limit is 0 to {2**53}"),
        (("--set", "storage=1", "--unset", "storage"), REFUSED, "storage is given twice"),
        (("--set", "storage=1", "--set", "storage=2"), REFUSED, "storage is given twice"),
    ],
)  # fmt: skip
async def test_what_is_no_limit_is_refused_and_changes_nothing(
    cli: Cli, given: tuple[str, ...], code: int, why: str
) -> None:
    tenant = (await new_tenant(cli))["id"]
    ended, said = await cli("quotas", tenant, "--set", "custom_domains=3", *given)
    assert (ended, why in str(said)) == (code, True), said
    assert await done(cli, "quotas", tenant) == {
        "tenant": tenant, "version": 1, "tier": "starter", "quotas": limits("starter"),
    }  # fmt: skip


async def test_limits_of_nobody_and_of_the_deleted_are_refused(cli: Cli) -> None:
    tenant = (await new_tenant(cli))["id"]
    await done(cli, "delete", tenant)
    assert (await done(cli, "quotas", tenant))["quotas"] == limits("starter")
    code, said = await cli("quotas", tenant, "--set", "storage=1")
    assert (code, "was deleted" in said) == (REFUSED, True)
    for more in ((), ("--set", "storage=1")):
        code, said = await cli("quotas", NOBODY, *more)
        assert (code, f"no tenant {NOBODY}" in said) == (REFUSED, True)


async def test_all_tenants_are_listed_by_page_and_filter(cli: Cli, platform: Platform, tmp_path: Path) -> None:
    before = [tenant["id"] for tenant in await done(cli, "list", "--limit", "1000")]
    behind = ("--after", before[-1])
    made = [await new_tenant(cli, "--tier", tier) for tier in ("scale", "free", "scale", "free", "scale")]
    await done(cli, "suspend", made[0]["id"])
    made[0] = await done(cli, "show", made[0]["id"])
    assert await done(cli, "list", *behind) == made
    paged = list[dict[str, Any]]()
    while page := await done(cli, "list", "--limit", "2", *("--after", paged[-1]["id"] if paged else before[-1])):
        assert len(page) == (2 if len(paged) < 4 else 1)
        paged += page
    assert paged == made
    scale = [tenant for tenant in made if tenant["tier"] == "scale"]
    assert await done(cli, "list", *behind, "--tier", "scale") == scale
    assert await done(cli, "list", *behind, "--tier", "scale", "--limit", "2") == scale[:2]
    assert await done(cli, "list", *behind, "--status", "suspended") == made[:1]
    assert await done(cli, "list", *behind, "--status", "active", "--tier", "scale") == scale[1:]
    assert await done(cli, "list", *behind, "--status", "deleted") == []
    heading, *lines = await table(platform, tmp_path, "list", *behind, "--status", "suspended")
    assert heading == ["id", "slug", "name", "tier", "status", "erase_after"]
    assert lines == [[made[0]["id"], made[0]["slug"], "Acme", "scale", "suspended"]]
    for wrong in (("--status", "asleep"), ("--tier", "platinum"), ("--limit", "0")):
        code, _ = await cli("list", *wrong)
        assert code == USAGE
    assert (await cli("list", "--after", "acme"))[0] == REFUSED
