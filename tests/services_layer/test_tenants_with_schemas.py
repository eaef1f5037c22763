"""ENABLE_SCHEMA_PER_TENANT: a tenant gets its schema in the transaction that makes it, and lives there as others do."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

from settler_streams.adapters.postgres import queries, tenant_schemas
from settler_streams.errors import ConflictError
from settler_streams.events import TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import CreatedTenant, RetentionKind, RetentionService, TenantService
from tests.services_layer.platform import Platform

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
        assert await places(owner, tenant.id) == {
            "users": {"own"}, "audit_logs": {"own"}, "api_keys": {"own"}, "tenant_retention": {"own"},
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


async def everything(owner: Connection) -> tuple[set[str], set[str]]:
    schemas = {name async for name in tenant_schemas.schemas(owner)}
    return schemas, {str(row[0]) for row in await owner.fetch("SELECT tenant_id FROM tenant_schemas")}
