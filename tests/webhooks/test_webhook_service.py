"""Webhooks as tenants manage them: secrets shown once, everything audited, nobody else's to see or touch."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from settler_streams.errors import ConfigurationError, ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services.webhooks import KeyRing, Sealed, WebhookService
from settler_streams.services.webhooks.rows import owner

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services

URL = "https://hooks.example/in"
FINISHED, DECIDED = "settler.job.finished.v1", "settler.job.decided.v1"


async def _row(pool: TenantConnectionPool, tenant: TenantId, webhook_id: str) -> Any:
    async with pool.tenant(tenant) as tx:
        return await tx.fetchrow("SELECT * FROM webhooks WHERE id = $1", webhook_id)


async def _audited(pool: TenantConnectionPool, tenant: TenantId) -> list[Any]:
    async with pool.tenant(tenant) as tx:
        return await tx.fetch("SELECT action, actor, subject, before, after FROM audit_logs ORDER BY recorded_at, id")


async def test_a_secret_is_shown_once_and_stored_encrypted(
    service: WebhookService, pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    issued = await service.create(tenant, URL, [FINISHED, DECIDED, FINISHED])
    assert issued.secret.startswith("whsec_")
    assert issued.secret not in repr(issued)
    secret = base64.b64decode(issued.secret.removeprefix("whsec_"))
    assert len(secret) == 32

    row = await _row(pool, tenant, issued.webhook_id)
    assert secret not in row["secret_encrypted"]
    sealed = Sealed(row["secret_key_id"], row["secret_encrypted"])
    assert KeyRing(settings).open(sealed, owner(tenant, issued.webhook_id)) == secret

    (webhook,) = await service.list(tenant)
    assert webhook == await service.get(tenant, issued.webhook_id)
    assert (webhook.url, webhook.event_types, webhook.status) == (URL, (DECIDED, FINISHED), "active")
    assert issued.secret not in json.dumps([dict(entry) for entry in await _audited(pool, tenant)])


async def test_every_change_is_audited(
    service: WebhookService, pool: TenantConnectionPool, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    webhook_id = (await service.create(tenant, URL, actor="me")).webhook_id
    assert (await service.pause(tenant, webhook_id, actor="me")).status == "paused"
    await service.pause(tenant, webhook_id, actor="me")  # changes nothing, and says nothing
    assert (await service.resume(tenant, webhook_id, actor="me")).status == "active"
    await service.rotate_secret(tenant, webhook_id, actor="me")
    await service.delete(tenant, webhook_id, actor="me")
    entries = await _audited(pool, tenant)
    assert [entry["action"] for entry in entries] == [
        "webhook.created", "webhook.paused", "webhook.resumed", "webhook.secret-rotated", "webhook.removed",
    ]  # fmt: skip
    assert {(entry["actor"], entry["subject"]) for entry in entries} == {("me", f"webhook/{webhook_id}")}
    assert json.loads(entries[0]["after"]) == {"url": URL, "event_types": []}
    assert json.loads(entries[1]["before"]) == {"status": "active"}
    assert await service.list(tenant) == []


async def test_after_a_rotation_the_old_secret_is_kept_for_the_overlap(
    service: WebhookService, pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    first = await service.create(tenant, URL)
    second = await service.rotate_secret(tenant, first.webhook_id.upper(), overlap_s=3600)
    assert second.secret != first.secret
    row = await _row(pool, tenant, first.webhook_id)
    ring, whose = KeyRing(settings), owner(tenant, first.webhook_id)
    opened = [
        ring.open(Sealed(row[f"{which}secret_key_id"], row[f"{which}secret_encrypted"]), whose)
        for which in ("previous_", "")
    ]
    assert opened == [base64.b64decode(issued.secret.removeprefix("whsec_")) for issued in (first, second)]
    assert 3590 < (row["previous_secret_until"] - row["updated_at"]).total_seconds() <= 3600
    for overlap_s in (-1, 31 * 86_400):
        with pytest.raises(InvalidRequestError, match="overlap"):
            await service.rotate_secret(tenant, first.webhook_id, overlap_s=overlap_s)


async def test_a_tenant_has_so_many_webhooks_and_no_more_however_fast_it_asks(
    pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant
) -> None:
    tenant, other = await new_tenant(), await new_tenant()
    service = WebhookService(pool, settings.model_copy(update={"webhooks_per_tenant": 3}))
    made = await asyncio.gather(*(service.create(tenant, URL) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, ConflictError) for one in made) == 5
    kept = await service.list(tenant)
    assert len(kept) == 3
    await service.create(other, URL)
    await service.delete(tenant, kept[0].id)
    await service.create(tenant, URL)


async def test_a_tenant_sees_and_changes_only_its_own(service: WebhookService, new_tenant: NewTenant) -> None:
    mine, theirs = await new_tenant(), await new_tenant()
    webhook_id = (await service.create(theirs, URL)).webhook_id
    assert await service.list(mine) == []
    for attempt in (service.get, service.pause, service.resume, service.rotate_secret, service.delete):
        with pytest.raises(NotFoundError, match="has no webhook"):
            await attempt(mine, webhook_id)  # type: ignore[operator]
    assert (await service.get(theirs, webhook_id)).status == "active"


async def test_bad_input_is_refused(
    service: WebhookService, pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant
) -> None:
    tenant = await new_tenant()
    with pytest.raises(InvalidRequestError, match=r"no such event types: settler\.tenant\.usage\.v1; there are"):
        await service.create(tenant, URL, ["settler.tenant.usage.v1"])
    with pytest.raises(InvalidRequestError, match="url: https only"):
        await service.create(tenant, "http://hooks.example/")
    with pytest.raises(NotFoundError, match="no tenant"):
        await service.create(TenantId(uuid7(1)), URL)
    with pytest.raises(NotFoundError, match="has no webhook"):
        await service.get(tenant, "no-uuid")
    with pytest.raises(ConfigurationError, match="SETTLER_WEBHOOK_KEYS"):
        await WebhookService(pool, settings.model_copy(update={"webhook_keys": None})).create(tenant, URL)
    async with pool.tenant(tenant) as tx:
        await tx.execute("UPDATE tenants SET status = 'deleted'")
    with pytest.raises(ConflictError, match="was deleted"):
        await service.create(tenant, URL)
    assert await service.list(tenant) == []


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM webhooks",
        "SELECT body FROM webhook_deliveries",
        "SELECT * FROM outbox",
        "UPDATE webhook_lanes SET due_at = now()",
        "UPDATE webhook_lanes SET tenant_id = gen_random_uuid()",
        "DELETE FROM webhook_lanes",
    ],
)
async def test_the_couriers_role_sees_lanes_and_takes_leases_and_nothing_else(
    service: WebhookService, pool: TenantConnectionPool, new_tenant: NewTenant, statement: str
) -> None:
    import asyncpg

    tenants = [await new_tenant() for _ in range(2)]
    for tenant in tenants:
        await service.create(tenant, URL)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.courier() as tx:
            await tx.execute(statement)
    async with pool.courier() as tx:
        seen = {str(row[0]) for row in await tx.fetch("SELECT tenant_id FROM webhook_lanes")}
        assert set(tenants) <= seen
        await tx.execute("SELECT set_config('app.tenant_id', $1, true)", tenants[0])
        assert {str(row[0]) for row in await tx.fetch("SELECT tenant_id FROM webhook_lanes")} == {tenants[0]}
