"""A tenant that is moved into a schema of its own, or back, has it in its audit log: both or neither."""

from __future__ import annotations

import json

import pytest

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.tenant_schemas import owner_connection
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId
from settler_streams.services import audit, move_tenant
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services


async def moves_of(platform: Platform, tenant: TenantId) -> list[tuple[str, str, str, str]]:
    """Who, from where, where to, and where the entry lies now."""
    async with platform.pool.tenant(tenant) as tx:
        rows = await tx.fetch(
            """SELECT actor, before, after, relnamespace::regnamespace::text AS lies
               FROM audit_logs a JOIN pg_class c ON c.oid = a.tableoid WHERE action = 'tenant.moved' ORDER BY id"""
        )
    return [
        (row["actor"], json.loads(row["before"])["schema"], json.loads(row["after"])["schema"],
         "own" if row["lies"].startswith("t_") else "shared")
        for row in rows
    ]  # fmt: skip


async def test_each_move_has_its_entry_which_moves_along(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant.id
    moved = await move_tenant(platform.settings, tenant, own_schema=True, actor="ann")
    assert moved > 0
    assert await move_tenant(platform.settings, tenant, own_schema=True, actor="eve") == 0, "it is there already"
    assert await moves_of(platform, tenant) == [("ann", "shared", "own", "own")]
    assert await move_tenant(platform.settings, tenant, own_schema=False, actor="bob") == moved + 1
    assert await moves_of(platform, tenant) == [("ann", "shared", "own", "shared"), ("bob", "own", "shared", "shared")]


@pytest.mark.parametrize("own_schema", [True, False])
async def test_without_its_entry_a_tenant_is_not_moved(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, own_schema: bool
) -> None:
    tenant = (await platform.new_tenant()).tenant.id
    if not own_schema:
        await move_tenant(platform.settings, tenant, own_schema=True)
    before = await moves_of(platform, tenant)
    with monkeypatch.context() as patch:
        patch.setattr(audit, "record", refused)
        with pytest.raises(UnavailableError, match="planted"):
            await move_tenant(platform.settings, tenant, own_schema=own_schema)
    assert await moves_of(platform, tenant) == before
    async with owner_connection(platform.settings) as owner:
        assert (await owner.fetchval(queries.SCHEMA_OF, tenant) is None) is own_schema


async def refused(*_args: object, **_kwargs: object) -> None:
    raise UnavailableError("planted")
