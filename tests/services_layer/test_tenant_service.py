"""Tenants: every change is one transaction, reaches admission, and can be counted on when the call returns."""

from __future__ import annotations

import asyncio
import json
import secrets

import pytest

from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.events import QuotaType, TenantStatus, TenantTier
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import (
    Acknowledgements,
    AuthenticationError,
    OutboxRelay,
    Scope,
    TenantNotYetKnownError,
    TenantService,
    acknowledgements,
    hash_password,
    verify_password,
)
from settler_streams.services.feed import TopicFeed
from settler_streams.services.publisher import Encoded
from tests.services_layer.platform import Platform, settled

pytestmark = pytest.mark.services


async def _known_as(platform: Platform, tenant_id: TenantId, version: int) -> None:
    """Wait until the directory has the tenant's ``version``."""

    def known() -> bool:
        tenant = platform.directory.get(tenant_id)
        return tenant is not None and tenant.version == version

    await settled(platform.directory.feed, known)


async def test_create_tenant_as_the_specification_writes_it(platform: Platform) -> None:
    slug = f"acme-{secrets.token_hex(4)}"
    tenant, owner = await platform.tenants.create_tenant(
        name="Acme Corp",
        slug=slug,
        owner_email="Admin@acme.com",
        owner_password_hash=await hash_password("password"),
        tier=TenantTier.STARTER,
    )
    assert (tenant.slug, tenant.tier, tenant.version, tenant.root_id) == (slug, TenantTier.STARTER, 1, tenant.id)
    assert await platform.tenants.get(tenant.id) == tenant
    async with platform.pool.tenant(tenant.id) as tx:
        user = await tx.fetchrow("SELECT email, role, password_hash FROM users WHERE id = $1", owner.id)
    assert (user["email"], user["role"]) == ("admin@acme.com", "owner")
    assert await verify_password(user["password_hash"], "password")
    assert not await verify_password(user["password_hash"], "Password")
    await settled(platform.directory.feed, lambda: platform.directory.get(tenant.id) is not None)


async def test_a_taken_slug_changes_nothing(platform: Platform) -> None:
    first = await platform.new_tenant()
    await platform.directory.find(first.tenant.id)
    known = len(platform.directory)
    with pytest.raises(ConflictError):
        await platform.tenants.create_tenant(
            name="Other", slug=first.tenant.slug, owner_email="a@b.example", owner_password_hash="x"
        )
    later = await platform.new_tenant()  # passes through outbox and topic, so an earlier one would have too
    await platform.directory.find(later.tenant.id)
    assert len(platform.directory) == known + 1


@pytest.mark.parametrize("wrong", [{"slug": "Not A Slug"}, {"name": ""}, {"owner_email": "nobody"}])
async def test_a_broken_rule_is_refused(platform: Platform, wrong: dict[str, str]) -> None:
    given = {"name": "A", "slug": f"s-{secrets.token_hex(4)}", "owner_email": "a@b.example", "owner_password_hash": "x"}
    with pytest.raises(InvalidRequestError):
        await platform.tenants.create_tenant(**(given | wrong))  # type: ignore[arg-type]


async def test_changes_count_versions_and_are_audited(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    await platform.tenants.change_tier(tenant.id, TenantTier.SCALE, actor="operator")
    await platform.tenants.change_quotas(tenant.id, {QuotaType.STORAGE: 7})
    await platform.tenants.suspend(tenant.id)
    last = await platform.tenants.reactivate(tenant.id)
    assert (last.version, last.tier, last.status) == (5, TenantTier.SCALE, TenantStatus.ACTIVE)
    assert await platform.tenants.reactivate(tenant.id) == last, "a change that changes nothing makes no version"
    async with platform.pool.tenant(tenant.id) as tx:
        rows = await tx.fetch("SELECT actor, action, before, after FROM audit_logs ORDER BY recorded_at, id")
    assert [row["action"] for row in rows] == [
        "tenant.created", "tenant.tier-changed", "tenant.quotas-changed", "tenant.suspended", "tenant.reactivated",
    ]  # fmt: skip
    assert rows[1]["actor"] == "operator"
    assert [json.loads(row["after"])["version"] for row in rows] == [1, 2, 3, 4, 5]
    assert json.loads(rows[1]["before"])["tier"] == "starter"
    await _known_as(platform, tenant.id, version=5)


async def test_changes_at_once_are_serialised(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    limits = [{QuotaType.STORAGE: n} for n in range(1, 9)]
    changed = await asyncio.gather(*(platform.tenants.change_quotas(tenant.id, limit) for limit in limits))
    assert sorted(t.version for t in changed) == list(range(2, 10))
    final = await platform.tenants.get(tenant.id)
    await _known_as(platform, tenant.id, version=9)
    known = platform.directory.get(tenant.id)
    assert known is not None
    assert known.quotas == final.quotas


async def test_limits_adjusted_at_once_are_all_kept(platform: Platform) -> None:
    tenant = (await platform.new_tenant(quotas={QuotaType.STORAGE: 7, QuotaType.CUSTOM_DOMAINS: 2})).tenant
    wanted = {quota: 10 for quota in QuotaType if quota is not QuotaType.CUSTOM_DOMAINS}
    await asyncio.gather(*(platform.tenants.adjust_quotas(tenant.id, {quota: 10}) for quota in wanted))
    assert (await platform.tenants.get(tenant.id)).quotas == {**wanted, QuotaType.CUSTOM_DOMAINS: 2}
    adjusted = await platform.tenants.adjust_quotas(tenant.id, {QuotaType.STORAGE: None, QuotaType.CUSTOM_DOMAINS: 0})
    del wanted[QuotaType.STORAGE]
    assert adjusted.quotas == {**wanted, QuotaType.CUSTOM_DOMAINS: 0}
    assert await platform.tenants.adjust_quotas(tenant.id, {QuotaType.STORAGE: None}) == adjusted
    await _known_as(platform, tenant.id, version=adjusted.version)
    known = platform.directory.get(tenant.id)
    assert known is not None
    assert known.quotas == adjusted.quotas


@pytest.mark.parametrize("limit", [-1, 2**53 + 1])
async def test_what_can_be_no_limit_is_refused_however_it_is_given(platform: Platform, limit: int) -> None:
    tenant, wrong = (await platform.new_tenant()).tenant, {QuotaType.STORAGE: limit}
    for giving in (
        platform.tenants.change_quotas(tenant.id, wrong),
        platform.tenants.adjust_quotas(tenant.id, wrong),
        platform.new_tenant(quotas=wrong),
    ):
        with pytest.raises(InvalidRequestError, match=f"storage={limit} is not"):
            await giving
    assert await platform.tenants.get(tenant.id) == tenant
    for change in (platform.tenants.change_quotas, platform.tenants.adjust_quotas):
        assert (await change(tenant.id, {QuotaType.STORAGE: 2**53})).quotas == {QuotaType.STORAGE: 2**53}


async def test_children_share_their_roots_partition_and_end_at_eight_levels(platform: Platform) -> None:
    root = parent = (await platform.new_tenant()).tenant
    for _ in range(7):
        parent = (await platform.new_tenant(parent_id=parent.id)).tenant
        assert parent.root_id == root.id
    await settled(platform.directory.feed, lambda: len(platform.directory.chain(parent.id)) == 8)
    with pytest.raises(InvalidRequestError, match="8 levels"):
        await platform.new_tenant(parent_id=parent.id)
    with pytest.raises(NotFoundError):
        await platform.new_tenant(parent_id=TenantId(uuid7(1)))


async def test_without_admission_the_tenant_exists_and_the_error_says_so(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acknowledgements, "ACKNOWLEDGED_WITHIN_S", 0.2)
    deaf = Acknowledgements(platform.settings)  # never started: it hears nothing
    service = TenantService(platform.pool, platform.relay, deaf)
    with pytest.raises(TenantNotYetKnownError) as caught:
        await service.create_tenant(
            name="Late", slug=f"late-{secrets.token_hex(4)}", owner_email="a@b.example", owner_password_hash="x"
        )
    assert await platform.tenants.get(caught.value.tenant.id) == caught.value.tenant


async def test_a_repeated_change_is_waited_for_until_admission_knows_it(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = (await platform.new_tenant()).tenant
    deaf = TenantService(platform.pool, platform.relay, Acknowledgements(platform.settings))
    versions: list[int] = []

    def on_change(changed: TenantId, version: int) -> None:
        if changed == tenant.id:
            versions.append(version)

    platform.directory.follow(on_change)
    with monkeypatch.context() as patched:
        patched.setattr(acknowledgements, "ACKNOWLEDGED_WITHIN_S", 0.2)
        for _ in range(2):
            with pytest.raises(TenantNotYetKnownError, match="is stored as version 2"):
                await deaf.suspend(tenant.id)
    suspended = await platform.tenants.suspend(tenant.id)
    assert (suspended.version, suspended.status) == (2, TenantStatus.SUSPENDED)
    await platform.tenants.reactivate(tenant.id)
    await _known_as(platform, tenant.id, version=3)
    platform.directory.unfollow(on_change)
    assert [version for version in versions if version > 1] == [2, 3], "each told once, however often announced"
    async with platform.pool.tenant(tenant.id) as tx:
        actions = [row["action"] for row in await tx.fetch("SELECT action FROM audit_logs ORDER BY recorded_at, id")]
    assert actions == ["tenant.created", "tenant.suspended", "tenant.reactivated"]


async def test_what_the_relay_could_not_publish_stays(platform: Platform) -> None:
    class Broken:
        async def publish_encoded(self, _events: object) -> None:
            raise UnavailableError("no broker")

    await platform.relay.stop()
    try:
        tenant_id = TenantId(uuid7(1_700_000_000_000))
        async with platform.pool.tenant(tenant_id) as tx:
            await tx.execute("INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, 't', 'k', '')", tenant_id)
        with pytest.raises(UnavailableError):
            await OutboxRelay(platform.pool, Broken()).publish_pending()  # type: ignore[arg-type]
        async with platform.pool.relay() as tx:
            assert await tx.fetchval("SELECT count(*) FROM outbox WHERE tenant_id = $1", tenant_id) == 1
            await tx.execute("DELETE FROM outbox WHERE tenant_id = $1", tenant_id)
    finally:
        await platform.relay.start()


async def test_a_relay_that_dies_after_publishing_publishes_again(platform: Platform) -> None:
    class DiesAfterwards:
        async def publish_encoded(self, events: list[Encoded]) -> None:
            await platform.publisher.publish_encoded(events)
            raise UnavailableError("died")

    arrived: list[tuple[TenantId, int]] = []
    changes = TopicFeed(
        platform.settings,
        "tenant-changes",
        lambda e: arrived.append((e.tenantid, e.data.version)),  # type: ignore[attr-defined]
        start="end",
    )
    await platform.relay.stop()
    await platform.relay.publish_pending()  # what an earlier test may have left
    await changes.start()
    try:
        creating = asyncio.create_task(platform.new_tenant())
        dying = OutboxRelay(platform.pool, DiesAfterwards())  # type: ignore[arg-type]
        async with asyncio.timeout(60):
            while True:
                try:
                    await dying.publish_pending()
                except UnavailableError:
                    break
        tenant = (await creating).tenant
        await platform.relay.publish_pending()
        await settled(changes, lambda: len(arrived) >= 2)
        assert arrived == [(tenant.id, 1)] * 2
        async with platform.pool.relay() as tx:
            assert await tx.fetchval("SELECT count(*) FROM outbox") == 0
    finally:
        await platform.relay.start()
        await changes.stop()


async def test_api_keys(platform: Platform) -> None:
    tenant = (await platform.new_tenant(TenantTier.GROWTH)).tenant
    other = (await platform.new_tenant()).tenant
    issued = await platform.tenants.issue_api_key(tenant.id, ["jobs:write", Scope.JOBS_READ])
    assert issued.key.startswith(f"sk_{tenant.id}_")
    assert issued.key not in repr(issued)
    principal = await platform.tenants.authenticate(issued.key)
    assert (principal.tenant_id, principal.tier) == (tenant.id, TenantTier.GROWTH)
    assert principal.scopes == {"jobs:write", "jobs:read"}
    async with platform.pool.tenant(tenant.id) as tx:
        stored = await tx.fetchrow("SELECT * FROM api_keys WHERE id = $1", issued.id)
    assert issued.key.split("_", 2)[2] not in str(dict(stored))
    forged = issued.key.replace(tenant.id, other.id)
    for wrong in ("", "sk_x_y", issued.key + "x", issued.key[:-1], forged):
        with pytest.raises(AuthenticationError):
            await platform.tenants.authenticate(wrong)
    with pytest.raises(NotFoundError):
        await platform.tenants.api_keys.revoke(other.id, issued.id)
    await platform.tenants.api_keys.revoke(tenant.id, issued.id)
    with pytest.raises(AuthenticationError):
        await platform.tenants.authenticate(issued.key)


async def test_an_unknown_scope_or_tenant_gets_no_key(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    with pytest.raises(InvalidRequestError):
        await platform.tenants.issue_api_key(tenant.id, ["everything"])
    with pytest.raises(NotFoundError):
        await platform.tenants.issue_api_key(TenantId(uuid7(1)), [Scope.JOBS_READ])


@pytest.mark.parametrize("password", ["short", "x" * 1025])
async def test_passwords_have_bounds(password: str) -> None:
    with pytest.raises(InvalidRequestError):
        await hash_password(password)
