"""A tenant's life: children, a name and a configuration, deletion with a grace period, and the way back."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from typing import Any

import pytest

from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.events import FileRecords, JobDecided, JobRequested, MatchRules, RejectReason, TenantStatus
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import AuthenticationError, Scope, Tenant
from settler_streams.services.feed import TopicFeed
from tests.services_layer.platform import Platform, settled

pytestmark = pytest.mark.services

NO_TIME = dt.timedelta(0)
RECORDS = FileRecords(path="a.csv", format="csv")
REQUEST = JobRequested(left=RECORDS, right=RECORDS, rules=MatchRules())


async def audit_of(platform: Platform, tenant_id: TenantId) -> list[dict[str, Any]]:
    """The tenant's entries in order, with before and after as documents."""
    async with platform.pool.tenant(tenant_id) as tx:
        rows = await tx.fetch(
            "SELECT actor, action, before, after, request_id FROM audit_logs"
            " WHERE tenant_id = $1 ORDER BY recorded_at, id",
            tenant_id,
        )
    return [
        {**row, "before": json.loads(row["before"] or "null"), "after": json.loads(row["after"] or "null")}
        for row in rows
    ]


async def known_as(platform: Platform, tenant: Tenant) -> None:
    """Wait until the directory has this version of the tenant; its status is then the same."""

    def known() -> bool:
        found = platform.directory.get(tenant.id)
        return found is not None and found.version == tenant.version

    await settled(platform.directory.feed, known)
    found = platform.directory.get(tenant.id)
    assert found is not None
    assert found.status is tenant.status


async def decision_on_a_job(platform: Platform, tenant: Tenant) -> JobDecided:
    job_id, decided = uuid7(time.time_ns() // 1_000_000), list[JobDecided]()
    feed = TopicFeed(
        platform.settings, "job-decisions",
        lambda e: decided.append(e.data) if isinstance(e.data, JobDecided) and e.data.job_id == job_id else None,
        start="end",
    )  # fmt: skip
    await feed.start()
    try:
        await platform.publisher.publish("job-requests", tenant.id, tenant.root_id, REQUEST, event_id=job_id)
        await settled(feed, lambda: bool(decided))
    finally:
        await feed.stop()
    return decided[0]


async def test_children_are_listed_by_page_and_who_looked_is_audited(platform: Platform) -> None:
    root = (await platform.new_tenant()).tenant
    made = [(await platform.new_tenant(parent_id=root.id)).tenant for _ in range(3)]
    grandchild = (await platform.new_tenant(parent_id=made[0].id)).tenant
    assert await platform.tenants.children(root.id) == sorted(made, key=lambda child: child.id)
    first = await platform.tenants.children(root.id, limit=2, actor="operator", request_id="r-1")
    rest = await platform.tenants.children(root.id, after=first[-1].id)
    assert first + rest == sorted(made, key=lambda child: child.id)
    assert await platform.tenants.children(made[0].id) == [grandchild]
    assert await platform.tenants.children(grandchild.id) == []
    entry = (await audit_of(platform, root.id))[2]
    assert (entry["action"], entry["actor"], entry["request_id"]) == ("tenant.children-listed", "operator", "r-1")
    assert entry["after"] == {"children": [child.id for child in first]}
    with pytest.raises(NotFoundError):
        await platform.tenants.children(TenantId(uuid7(1)))
    for wrong in (0, 1_001):
        with pytest.raises(InvalidRequestError, match="1 to 1000"):
            await platform.tenants.children(root.id, limit=wrong)


@pytest.mark.parametrize("suspended", [False, True])
async def test_a_deleted_tenant_is_refused_everywhere_until_it_is_restored_as_it_was(
    platform: Platform, suspended: bool
) -> None:
    tenant = (await platform.new_tenant()).tenant
    issued = await platform.tenants.issue_api_key(tenant.id, [Scope.JOBS_WRITE])
    if suspended:
        await platform.tenants.suspend(tenant.id)
    earliest = dt.datetime.now(dt.UTC) + dt.timedelta(days=3)
    deleted = await platform.tenants.delete(tenant.id, grace=dt.timedelta(days=3), actor="operator", request_id="r-2")
    assert deleted.status is TenantStatus.DELETED
    assert deleted.erase_after is not None
    assert earliest <= deleted.erase_after <= dt.datetime.now(dt.UTC) + dt.timedelta(days=3)
    assert await platform.tenants.get(tenant.id) == deleted
    await known_as(platform, deleted)
    refused = await decision_on_a_job(platform, tenant)
    assert (refused.admitted, refused.reason) == (False, RejectReason.TENANT_SUSPENDED)
    with pytest.raises(AuthenticationError):
        await platform.tenants.authenticate(issued.key)
    for change in (platform.tenants.delete, platform.tenants.suspend, platform.tenants.reactivate):
        with pytest.raises(ConflictError, match="was deleted"):
            await change(tenant.id)

    restored = await platform.tenants.restore(tenant.id)
    assert restored.status is (TenantStatus.SUSPENDED if suspended else TenantStatus.ACTIVE)
    assert (restored.erase_after, restored.restored_as, restored.version) == (None, None, deleted.version + 1)
    await known_as(platform, restored)
    assert (await decision_on_a_job(platform, tenant)).admitted is not suspended
    await platform.tenants.authenticate(issued.key)
    with pytest.raises(ConflictError, match="is not deleted"):
        await platform.tenants.restore(tenant.id)
    entries = {entry["action"]: entry for entry in await audit_of(platform, tenant.id)}
    assert entries["tenant.deleted"]["actor"] == "operator"
    assert entries["tenant.deleted"]["request_id"] == "r-2"
    assert entries["tenant.deleted"]["before"]["erase_after"] is None
    assert entries["tenant.restored"]["before"]["erase_after"] == str(deleted.erase_after)


async def test_parents_outlive_their_children(platform: Platform) -> None:
    parent = (await platform.new_tenant()).tenant
    child = (await platform.new_tenant(parent_id=parent.id)).tenant
    with pytest.raises(ConflictError, match=child.slug):
        await platform.tenants.delete(parent.id)
    await platform.tenants.delete(child.id)
    await platform.tenants.delete(parent.id)
    with pytest.raises(ConflictError, match="restore that first"):
        await platform.tenants.restore(child.id)
    with pytest.raises(InvalidRequestError, match="is deleted"):
        await platform.new_tenant(parent_id=parent.id)
    await platform.tenants.restore(parent.id)
    await platform.tenants.restore(child.id)


async def test_a_tenant_that_gets_a_child_at_the_moment_of_its_deletion_keeps_one_of_them(platform: Platform) -> None:
    for _ in range(5):
        parent = (await platform.new_tenant()).tenant
        made, deleted = await asyncio.gather(
            platform.new_tenant(parent_id=parent.id), platform.tenants.delete(parent.id), return_exceptions=True
        )
        assert isinstance(made, InvalidRequestError) is not isinstance(deleted, ConflictError), (made, deleted)


async def test_only_what_is_past_its_grace_can_be_erased_children_first(platform: Platform) -> None:
    parent = (await platform.new_tenant()).tenant
    child = (await platform.new_tenant(parent_id=parent.id)).tenant
    kept = (await platform.new_tenant()).tenant
    for tenant_id, grace in ((child.id, NO_TIME), (parent.id, NO_TIME), (kept.id, None)):
        await known_as(platform, await platform.tenants.delete(tenant_id, grace=grace))
    over = [tenant.id for tenant in await platform.tenants.erasable(platform.directory)]
    assert over.index(child.id) < over.index(parent.id)
    assert kept.id not in over
    with pytest.raises(ConflictError, match="could be restored until"):
        await platform.tenants.restore(parent.id)
    for wrong in (dt.timedelta(seconds=-1), dt.timedelta(days=3651)):
        with pytest.raises(InvalidRequestError, match="0 to 3650 days"):
            await platform.tenants.delete(kept.id, grace=wrong)


async def test_nobody_can_be_erased_before_all_that_are_under_it(platform: Platform) -> None:
    root = (await platform.new_tenant()).tenant
    parent = (await platform.new_tenant(parent_id=root.id)).tenant
    child, other = [(await platform.new_tenant(parent_id=parent.id)).tenant for _ in range(2)]
    for tenant_id, grace in ((child.id, None), (other.id, NO_TIME), (parent.id, NO_TIME), (root.id, NO_TIME)):
        await known_as(platform, await platform.tenants.delete(tenant_id, grace=grace))
    over = {tenant.id for tenant in await platform.tenants.erasable(platform.directory)}
    assert over & {root.id, parent.id, child.id, other.id} == {other.id}


async def test_a_configuration_is_replaced_as_a_whole_and_every_version_is_kept(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    config = {"locale": "de", "limits": {"rows": [1, 2.5, None, True]}, "ä": "☃"}
    changed = await platform.tenants.change_config(tenant.id, config, if_version=1, actor="me", request_id="r-3")
    assert (changed.config, changed.version) == (config, 2)
    assert await platform.tenants.get(tenant.id) == changed
    with pytest.raises(ConflictError, match="has version 2, not 1"):
        await platform.tenants.change_config(tenant.id, {}, if_version=1)
    assert await platform.tenants.change_config(tenant.id, config) == changed, "the same again makes no version"
    assert (await platform.tenants.change_config(tenant.id, {})).version == 3
    entries = [e for e in await audit_of(platform, tenant.id) if e["action"] == "tenant.config-changed"]
    assert [(e["before"]["config"], e["after"]["config"]) for e in entries] == [({}, config), (config, {})]
    assert (entries[0]["actor"], entries[0]["request_id"]) == ("me", "r-3")


async def test_a_configuration_is_another_where_only_python_sees_no_difference(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    for version, value in enumerate((1, True, 1.0, 0, False), start=2):
        changed = await platform.tenants.change_config(tenant.id, {"a": [{"b": value}]})
        assert (changed.version, repr(changed.config)) == (version, repr({"a": [{"b": value}]}))
        assert repr((await platform.tenants.get(tenant.id)).config) == repr(changed.config)


@pytest.mark.parametrize(
    "wrong", [["a"], "a", {"a": float("nan")}, {"a": object()}, {"a": "\ud800"}, {"a": "\0"}, {"a": "x" * 16_377}]
)
async def test_what_is_no_configuration_is_refused(platform: Platform, wrong: Any) -> None:
    tenant = (await platform.new_tenant()).tenant
    with pytest.raises(InvalidRequestError):
        await platform.tenants.change_config(tenant.id, wrong)
    assert (await platform.tenants.get(tenant.id)).version == 1


async def test_the_largest_configuration_is_kept(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    config = {"a": "x" * 16_375}
    assert (await platform.tenants.change_config(tenant.id, config)).config == config


async def test_a_tenant_is_renamed_and_keeps_its_slug(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    renamed = await platform.tenants.rename(tenant.id, "Acme & Söhne")
    assert (renamed.name, renamed.slug, renamed.version) == ("Acme & Söhne", tenant.slug, 2)
    assert await platform.tenants.get(tenant.id) == renamed
    entry = (await audit_of(platform, tenant.id))[-1]
    assert (entry["before"]["name"], entry["after"]["name"]) == (tenant.name, "Acme & Söhne")
    for wrong in ("", "x" * 201):
        with pytest.raises(InvalidRequestError):
            await platform.tenants.rename(tenant.id, wrong)
