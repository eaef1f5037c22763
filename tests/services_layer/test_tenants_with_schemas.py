"""ENABLE_SCHEMA_PER_TENANT: a tenant gets its schema in the transaction that makes it, and lives there as others do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from settler_streams.adapters.postgres import queries, tenant_schemas
from settler_streams.adapters.postgres.effects import JobDecision
from settler_streams.errors import ConflictError, UnavailableError
from settler_streams.events import TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import CreatedTenant, RetentionKind, RetentionService, TenantService, audit
from tests.adapters.postgres.test_postgres_tenant_schemas import project
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.roles import Connection

pytestmark = pytest.mark.services


@contextlib.asynccontextmanager
async def service_of(platform: Platform, *, own_schemas: bool = True) -> AsyncIterator[TenantService]:
    """As a process makes it from its settings."""
    settings = platform.settings.model_copy(update={"enable_schema_per_tenant": own_schemas})
    async with TenantService.connect(settings) as service:
        yield service


async def created(service: TenantService, slug: str | None = None, parent_id: TenantId | None = None) -> CreatedTenant:
    slug = slug or f"own-{secrets.token_hex(6)}"
    return await service.create_tenant(
        name="Own", slug=slug, owner_email=f"o@{slug}.example", owner_password_hash="unused", parent_id=parent_id
    )


async def places(owner: Connection, tenant: TenantId) -> dict[str, set[str]]:
    """The schemas in which the tenant has rows, for each table of tenants."""
    found: dict[str, set[str]] = {}
    for schema in ("public", await owner.fetchval(queries.SCHEMA_OF, tenant)):
        for (table,) in await owner.fetch("SELECT relname FROM pg_class WHERE oid IN (SELECT tenant_tables('public'))"):
            if schema and await owner.fetchval(f"SELECT count(*) FROM {schema}.{table} WHERE tenant_id = $1", tenant):
                found.setdefault(table, set()).add("public" if schema == "public" else "own")
    return found


async def test_a_new_tenant_has_a_schema_of_its_own_with_everything_in_it(platform: Platform) -> None:
    async with service_of(platform) as service, tenant_schemas.owner_connection(platform.settings) as owner:
        tenant = (await created(service)).tenant
        schema = await owner.fetchval(queries.SCHEMA_OF, tenant.id)
        assert tenant_schemas.tenant_of(schema) == tenant.id
        assert await tenant_schemas.differences(owner, schema) == []
        assert await places(owner, tenant.id) == {"users": {"own"}, "audit_logs": {"own"}}

        issued = await service.issue_api_key(tenant.id, ["jobs:read"])
        assert (await service.authenticate(issued.key)).tenant_id == tenant.id
        assert (await service.change_tier(tenant.id, TenantTier.GROWTH)).tier is TenantTier.GROWTH
        await RetentionService(platform.pool).change(tenant.id, {RetentionKind.USAGE: 7})
        first_job = JobDecision(
            tenant_id=tenant.id, job_id=str(uuid.uuid4()), kind="k", priority="low", decision="admitted",
            requested_at_ms=1, decided_at_ms=2, source_version=1,
        )  # fmt: skip
        async with platform.pool.platform() as tx:
            await project(tx, [first_job])
        assert await places(owner, tenant.id) == {
            "users": {"own"}, "audit_logs": {"own"}, "api_keys": {"own"}, "tenant_retention": {"own"}, "jobs": {"own"},
        }  # fmt: skip


@pytest.mark.parametrize(("parents_own", "childs_own"), [(True, True), (True, False), (False, True)])
async def test_parents_and_children_need_not_live_in_the_same_way(
    platform: Platform, parents_own: bool, childs_own: bool
) -> None:
    async with (
        service_of(platform, own_schemas=parents_own) as parents,
        service_of(platform, own_schemas=childs_own) as children,
        tenant_schemas.owner_connection(platform.settings) as owner,
    ):
        parent = (await created(parents)).tenant
        child = (await created(children, parent_id=parent.id)).tenant
        assert (child.root_id, child.parent_id) == (parent.id, parent.id)
        for tenant, own in ((parent, parents_own), (child, childs_own)):
            assert (await places(owner, tenant.id))["users"] == {"own" if own else "public"}
        assert await parents.children(parent.id) == [child]
        with pytest.raises(ConflictError, match="has a child"):
            await parents.delete(parent.id)
        await children.delete(child.id)
        await parents.delete(parent.id)
        with pytest.raises(ConflictError, match="was deleted; restore that first"):
            await children.restore(child.id)
        await parents.restore(parent.id)
        assert (await children.restore(child.id)).status == child.status


async def test_a_tenant_that_is_refused_leaves_no_schema(platform: Platform) -> None:
    async with service_of(platform) as service, tenant_schemas.owner_connection(platform.settings) as owner:
        slug = (await created(service)).tenant.slug
        before = await everything(owner)
        with pytest.raises(ConflictError, match="is taken"):
            await created(service, slug)
        assert await everything(owner) == before


async def test_a_tenant_whose_making_fails_after_its_schema_leaves_none(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service_of(platform) as service, tenant_schemas.owner_connection(platform.settings) as owner:
        before, slug = await everything(owner), f"own-{secrets.token_hex(6)}"
        with monkeypatch.context() as patch:
            patch.setattr(audit, "record", refused)
            with pytest.raises(UnavailableError, match="planted"):
                await created(service, slug)
        assert await everything(owner) == before
        assert (await places(owner, (await created(service, slug)).tenant.id))["users"] == {"own"}


async def refused(*_args: object, **_kwargs: object) -> None:
    raise UnavailableError("planted")


PROGRAM = """
import asyncio, os, signal, sys
import asyncpg
from settler_streams.services import TenantService, tenant_store
from settler_streams.settings import Settings

point, slug = sys.argv[1:]
record, execute = tenant_store.record, asyncpg.Connection.execute
making = None

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def recorded(tx, *arguments):
    global making
    if point == "made":
        die()
    await record(tx, *arguments)
    making = tx.get_server_pid()

async def dying(self, query, *arguments, **more):
    if self.get_server_pid() != making or not query.startswith("COMMIT"):
        return await execute(self, query, *arguments, **more)
    if point == "committed":
        await execute(self, query, *arguments, **more)
    die()

async def main():
    async with TenantService.connect(Settings.from_environment()) as service:
        await service.create_tenant(name="Own", slug=slug, owner_email="o@x.example", owner_password_hash="unused")

tenant_store.record, asyncpg.Connection.execute = recorded, dying
asyncio.run(main())
"""


@pytest.mark.parametrize(("point", "is_there"), [("made", False), ("before the commit", False), ("committed", True)])
async def test_who_is_killed_while_making_a_tenant_leaves_it_with_its_schema_or_neither(
    platform: Platform, point: str, is_there: bool
) -> None:
    settings = platform.settings.model_copy(update={"enable_schema_per_tenant": True})
    slug = f"own-{secrets.token_hex(6)}"
    async with service_of(platform) as service, tenant_schemas.owner_connection(platform.settings) as owner:
        before = await everything(owner)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, point, slug, env={**os.environ, **settings.environment()}
        )
        assert await process.wait() == -signal.SIGKILL
        if is_there:
            with pytest.raises(ConflictError, match="is taken"):
                await created(service, slug)
        else:
            # Waits for the server to have ended the transaction of the killed one, which had the slug.
            await created(service, slug)
        tenant = TenantId(str(await owner.fetchval("SELECT id FROM tenants WHERE slug = $1", slug)))
        assert await places(owner, tenant) == {"users": {"own"}, "audit_logs": {"own"}}
        schema = await owner.fetchval(queries.SCHEMA_OF, tenant)
        assert await everything(owner) == (before[0] | {schema}, before[1] | {tenant})


async def test_tenants_made_at_once_do_not_stop_each_other(platform: Platform) -> None:
    async with service_of(platform) as service, tenant_schemas.owner_connection(platform.settings) as owner:
        parent = (await created(service)).tenant.id
        async with asyncio.timeout(SETTLED_WITHIN_S):
            made = await asyncio.gather(*(created(service, parent_id=above) for above in (None, parent, None, parent)))
        for one in made:
            assert (await places(owner, one.tenant.id))["users"] == {"own"}


@pytest.mark.parametrize("to_own", [True, False])
async def test_while_a_tenant_is_moved_all_others_are_changed_as_ever(platform: Platform, to_own: bool) -> None:
    """With a schema of their own or without: whatever the move has locked, it has locked of the one tenant alone."""
    settings = platform.settings
    async with service_of(platform, own_schemas=not to_own) as service, service_of(platform) as others:
        moved = (await created(service)).tenant.id
        other, key = (await created(others)).tenant.id, (await platform.new_tenant()).tenant.id
        api_key = (await platform.tenants.issue_api_key(key, ["jobs:read"])).key
        under_way, go_on = asyncio.Event(), asyncio.Event()

        async def stopped(_tx: object, _rows: int) -> None:
            under_way.set()
            await go_on.wait()

        moving = asyncio.create_task(tenant_schemas.move(settings, moved, own_schema=to_own, note=stopped))
        try:
            async with asyncio.timeout(SETTLED_WITHIN_S):
                await under_way.wait()
                for tenant in (other, key):
                    await platform.tenants.issue_api_key(tenant, ["jobs:read"])
                    await platform.tenants.change_tier(tenant, TenantTier.SCALE)
                assert (await platform.tenants.authenticate(api_key)).tenant_id == key
                again = (await created(others)).tenant.id
                await tenant_schemas.move(settings, again, own_schema=False)
                await tenant_schemas.move(settings, again, own_schema=True)
        finally:
            go_on.set()
            assert await moving > 0


async def test_whoever_reads_for_long_does_not_keep_a_schema_from_being_dropped(platform: Platform) -> None:
    """An export reads all of a tenant in one snapshot; authentication would wait behind a lock that waits for it."""
    async with service_of(platform) as service, contextlib.AsyncExitStack() as stack:
        moved, read = (await created(service)).tenant.id, (await platform.new_tenant()).tenant.id
        api_key = (await platform.tenants.issue_api_key(read, ["jobs:read"])).key
        reader = await stack.enter_async_context(platform.pool.tenant(read))
        assert await reader.fetchval("SELECT count(*) FROM tenants") == 1
        async with asyncio.timeout(SETTLED_WITHIN_S):
            assert await tenant_schemas.move(platform.settings, moved, own_schema=False) > 0
            assert (await platform.tenants.authenticate(api_key)).tenant_id == read


async def everything(owner: Connection) -> tuple[set[str], set[str]]:
    schemas = {name async for name in tenant_schemas.schemas(owner)}
    return schemas, {str(row[0]) for row in await owner.fetch("SELECT tenant_id FROM tenant_schemas")}
