"""What a tenant has, such as users and keys: each change of it is a version, an event and an audit entry, or none."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import secrets
from collections.abc import Awaitable, Callable, Sequence

import pytest
from pydantic import SecretStr

from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.events import Envelope, Part, QuotaType, TenantChanged, TenantStatus, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import ApiKeys, DomainService, Scope, move_tenant, tenant_store
from settler_streams.services.retention import RetentionKind, RetentionService
from settler_streams.services.users import Role, UserService
from settler_streams.services.webhooks import WebhookService
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform, settled

pytestmark = pytest.mark.services

URL = "https://hooks.example/settler"
PASSWORD = "correct horse battery"


class Records:
    """A DNS in which every asked name has what it has to."""

    def __init__(self) -> None:
        self.value = ""

    async def of(self, name: str) -> Sequence[str]:
        return [self.value]


class Owned:
    """Every service that changes something of a tenant's but its own row."""

    def __init__(self, platform: Platform) -> None:
        settings = platform.settings.model_copy(update={"webhook_keys": SecretStr(f"one:{secrets.token_hex(32)}")})
        self.records = Records()
        self.keys = ApiKeys(platform.pool)
        self.users = UserService(platform.pool)
        self.webhooks = WebhookService(platform.pool, settings)
        self.retention = RetentionService(platform.pool)
        self.domains = DomainService(platform.pool, self.records, platform.relay)

    async def change_all(self, tenant_id: TenantId, done: Callable[[str], Awaitable[None]]) -> None:
        """Each kind of change once; ``done`` is told its action after each."""
        user = await self.users.add(tenant_id, "a@acme.example", Role.MEMBER, PASSWORD)
        await done("user.added")
        await self.users.change_role(tenant_id, user.id, Role.ADMIN)
        await done("user.role-changed")
        await self.users.disable(tenant_id, user.id)
        await done("user.disabled")
        await self.users.enable(tenant_id, user.id)
        await done("user.enabled")
        await self.users.remove(tenant_id, user.id)
        await done("user.removed")
        invitation = await self.users.invite(tenant_id, "b@acme.example", Role.VIEWER)
        await done("user.invited")
        await self.users.accept(invitation.token, PASSWORD)
        await done("user.accepted")
        key = await self.keys.issue(tenant_id, [Scope.JOBS_READ])
        await done("api-key.issued")
        await self.keys.change_scopes(tenant_id, key.id, [Scope.JOBS_WRITE])
        await done("api-key.scopes-changed")
        await self.keys.change_expiry(tenant_id, key.id, dt.datetime.now(dt.UTC) + dt.timedelta(days=9))
        await done("api-key.expiry-changed")
        await self.keys.revoke(tenant_id, key.id)
        await done("api-key.revoked")
        domain = await self.domains.add(tenant_id, "app.acme.example")
        await done("domain.added")
        self.records.value = domain.record_value
        await self.domains.verify(tenant_id, domain.id)
        await done("domain.verified")
        await self.domains.remove(tenant_id, domain.id)
        await done("domain.removed")
        webhook = await self.webhooks.create(tenant_id, URL)
        await done("webhook.created")
        await self.webhooks.pause(tenant_id, webhook.webhook_id)
        await done("webhook.paused")
        await self.webhooks.resume(tenant_id, webhook.webhook_id)
        await done("webhook.resumed")
        await self.webhooks.rotate_secret(tenant_id, webhook.webhook_id)
        await done("webhook.secret-rotated")
        await self.webhooks.delete(tenant_id, webhook.webhook_id)
        await done("webhook.removed")
        await self.retention.change(tenant_id, {RetentionKind.USAGE: 30})
        await done("tenant.retention-changed")


@pytest.fixture
def owned(platform: Platform) -> Owned:
    return Owned(platform)


async def _version(platform: Platform, tenant_id: TenantId) -> int:
    return (await platform.tenants.get(tenant_id)).version


async def test_every_change_of_what_a_tenant_has_is_a_version_an_event_and_an_entry_of_its_id(
    platform: Platform, owned: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = (await platform.new_tenant(TenantTier.GROWTH, quotas={QuotaType.STORAGE: 7})).tenant
    events: list[tuple[str, TenantChanged]] = []
    on_event = platform.directory.feed._on_event

    def heard(event: Envelope[Part]) -> None:
        on_event(event)
        if event.tenantid == created.id and isinstance(event.data, TenantChanged):
            events.append((event.id, event.data))

    monkeypatch.setattr(platform.directory.feed, "_on_event", heard)
    actions = ["tenant.created"]

    async def done(action: str) -> None:
        actions.append(action)
        assert await _version(platform, created.id) == len(actions), action

    await owned.change_all(created.id, done)
    await settled(platform.directory.feed, lambda: bool(events) and events[-1][1].version == len(actions))
    told = {event_id: changed for event_id, changed in events if changed.version > 1}
    assert [changed.version for changed in told.values()] == list(range(2, len(actions) + 1))
    for changed in told.values():  # everything that is decided by is as it was
        assert (changed.slug, changed.tier, changed.status) == (created.slug, TenantTier.GROWTH, TenantStatus.ACTIVE)
        assert (changed.root_id, changed.parent_id, changed.quotas) == (created.id, None, {QuotaType.STORAGE: 7})
    async with platform.pool.tenant(created.id) as tx:
        entries = await tx.fetch("SELECT id, action FROM audit_logs ORDER BY recorded_at, id")
    assert [entry["action"] for entry in entries] == actions
    assert [str(entry["id"]) for entry in entries[1:]] == list(told)
    assert (await platform.tenants.suspend(created.id)).version == len(actions) + 1, "which admission acknowledges"


async def test_what_is_refused_or_changes_nothing_makes_no_version(platform: Platform, owned: Owned) -> None:
    created = await platform.new_tenant()
    tenant_id = created.tenant.id
    key = await owned.keys.issue(tenant_id, [Scope.JOBS_READ])
    webhook = await owned.webhooks.create(tenant_id, URL)
    await owned.retention.change(tenant_id, {RetentionKind.USAGE: 30})
    before = await _version(platform, tenant_id)
    assert before == 4
    for refused in (
        owned.users.remove(tenant_id, created.owner.id),
        owned.users.invite(tenant_id, created.owner.email, Role.ADMIN),
        owned.users.add(tenant_id, created.owner.email, Role.ADMIN, PASSWORD),
    ):
        with pytest.raises(ConflictError):
            await refused
    await owned.keys.change_scopes(tenant_id, key.id, [Scope.JOBS_READ])
    await owned.webhooks.resume(tenant_id, webhook.webhook_id)
    await owned.retention.change(tenant_id, {RetentionKind.USAGE: 30})
    assert await _version(platform, tenant_id) == before


@pytest.mark.parametrize("own_schema", [False, True])
async def test_changes_of_everything_at_once_follow_each_other(
    platform: Platform, owned: Owned, own_schema: bool
) -> None:
    """None waits for another that waits for it, whatever two of them both lock; children are made meanwhile."""
    tenant_id = (await platform.new_tenant(quotas={QuotaType.CUSTOM_DOMAINS: 9})).tenant.id
    if own_schema:
        await move_tenant(platform.settings, tenant_id, own_schema=True)
    key = await owned.keys.issue(tenant_id, [Scope.JOBS_READ])
    webhook = await owned.webhooks.create(tenant_id, URL)
    before = await _version(platform, tenant_id)
    changes: list[Awaitable[object]] = []
    for n in range(4):
        changes += [
            owned.keys.rotate(tenant_id, key.id, overlap=dt.timedelta(hours=n + 1)),
            owned.keys.issue(tenant_id, [Scope.JOBS_WRITE]),
            owned.webhooks.rotate_secret(tenant_id, webhook.webhook_id),
            owned.users.invite(tenant_id, f"{n}@acme.example", Role.MEMBER),
            owned.domains.add(tenant_id, f"d{n}.acme.example"),
            owned.retention.change(tenant_id, {RetentionKind.USAGE: 30 + n}),
            platform.tenants.change_quotas(tenant_id, {QuotaType.STORAGE: n, QuotaType.CUSTOM_DOMAINS: 9}),
        ]
    children = [platform.new_tenant(parent_id=tenant_id) for _ in range(3)]
    async with asyncio.timeout(SETTLED_WITHIN_S):
        await asyncio.gather(*changes, *children)
    # A rotation is two changes: of the key that comes and of the one that goes, unless that ended as soon before.
    last = await _version(platform, tenant_id)
    assert before + len(changes) <= last <= before + len(changes) + 4

    def known() -> bool:
        tenant = platform.directory.get(tenant_id)
        return tenant is not None and tenant.version == last

    await settled(platform.directory.feed, known)
    async with asyncio.timeout(SETTLED_WITHIN_S):
        ended = await asyncio.gather(
            *(owned.keys.revoke(tenant_id, key.id) for _ in range(3)),
            *(owned.keys.rotate(tenant_id, key.id) for _ in range(3)),
            *(owned.keys.change_scopes(tenant_id, key.id, [scope]) for scope in Scope),
            return_exceptions=True,
        )
    assert [one for one in ended if isinstance(one, BaseException) and not isinstance(one, NotFoundError)] == []


async def test_of_a_deleted_tenant_everything_can_still_be_ended(platform: Platform, owned: Owned) -> None:
    tenant_id = (await platform.new_tenant()).tenant.id
    key = await owned.keys.issue(tenant_id, [Scope.JOBS_READ])
    webhook = await owned.webhooks.create(tenant_id, URL)
    deleted = await platform.tenants.delete(tenant_id)
    await owned.keys.revoke(tenant_id, key.id)
    await owned.webhooks.pause(tenant_id, webhook.webhook_id)
    await owned.webhooks.delete(tenant_id, webhook.webhook_id)
    assert await _version(platform, tenant_id) == deleted.version + 3
    for refused in (
        owned.keys.issue(tenant_id, [Scope.JOBS_READ]),
        owned.webhooks.create(tenant_id, URL),
        owned.users.invite(tenant_id, "c@acme.example", Role.MEMBER),
        owned.domains.add(tenant_id, "app.acme.example"),
    ):
        with pytest.raises(ConflictError, match="was deleted"):
            await refused


async def test_rows_that_refer_to_a_tenant_do_not_wait_for_a_change_of_it(platform: Platform) -> None:
    tenant_id = (await platform.new_tenant()).tenant.id
    async with contextlib.AsyncExitStack() as stack:
        changing = await stack.enter_async_context(platform.pool.tenant(tenant_id))
        await tenant_store.hold(changing, tenant_id)
        async with asyncio.timeout(SETTLED_WITHIN_S), platform.pool.tenant(tenant_id) as tx:
            await tx.execute(
                "INSERT INTO tenant_retention (tenant_id, kind, keep_days) VALUES ($1, 'usage', 30)", tenant_id
            )
