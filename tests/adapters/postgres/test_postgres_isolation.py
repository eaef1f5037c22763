"""What one tenant can see and do to another: nothing."""

from __future__ import annotations

import uuid

import asyncpg
import pytest

from settler_streams.ids import PLATFORM

pytestmark = pytest.mark.services

# One row of every tenant table, valid under the tenant $1.
ROWS = {
    "users": "INSERT INTO users (tenant_id, id, email, password_hash, role) VALUES ($1, $2, 'a@b', 'h', 'owner')",
    "api_keys": "INSERT INTO api_keys (tenant_id, id, key_hash, name) VALUES ($1, $2, sha256('k'), 'k')",
    "domains": "INSERT INTO domains (tenant_id, id, domain, verification_token) VALUES ($1, $2, 'a.example', 't')",
    "webhooks": "INSERT INTO webhooks (tenant_id, id, url, secret_encrypted, secret_key_id) "
    "VALUES ($1, $2, 'https://a', 's', 'k')",
    "webhook_deliveries": "WITH w AS (INSERT INTO webhooks (tenant_id, id, url, secret_encrypted, secret_key_id) "
    "VALUES ($1, $2, 'https://a', 's', 'k') ON CONFLICT DO NOTHING) "
    "INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body) VALUES ($1, $2, $2, 't', '{}')",
    "webhook_lanes": "INSERT INTO webhook_lanes (tenant_id, webhook_id) VALUES ($1, $2)",
    "jobs": "INSERT INTO jobs (tenant_id, job_id, decision, decision_version) VALUES ($1, $2, 'admitted', 0)",
    "executions": "INSERT INTO executions (tenant_id, job_id, attempt, executor, status, source_version) "
    "VALUES ($1, $2, 1, 'e', 'running', 0)",
    "matches": "INSERT INTO matches VALUES ($1, $2, 1, 1, 'one_to_one', 'l', '{r}', 'EUR', 'EUR', 1, 1, 0)",
    "unmatched": "INSERT INTO unmatched VALUES ($1, $2, 1, 1, 'left', 1, 'r', 'EUR', 1, '2026-01-01', 'no_key_match')",
    "reports": "INSERT INTO reports VALUES ($1, $2, 1, 'EUR', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)",
    "tenant_usage": "INSERT INTO tenant_usage VALUES ($1, $2::uuid::text, now(), 60, 1, 0)",
    "tenant_quota_usage": "INSERT INTO tenant_quota_usage VALUES ($1, $2::uuid::text, 1, 0, 1, now(), 0)",
    "tenant_signals": "INSERT INTO tenant_signals VALUES ($1, $2, 'noisy', 'r', '{}', now(), 0)",
    "feature_flags": "INSERT INTO feature_flags (tenant_id, flag, scope, enabled, changed_by, changed_at, "
    "source_version) VALUES ($1, $2::uuid::text, 'tenant', true, 'me', now(), 0)",
    "tenant_retention": "INSERT INTO tenant_retention (tenant_id, kind, keep_days) "
    "SELECT $1, 'usage', 1 + (hashtext($2::uuid::text) & 1023) ON CONFLICT DO NOTHING",
    "tenant_children": "INSERT INTO tenant_children VALUES ($1, $2)",
    "dead_letters": "INSERT INTO dead_letters VALUES ($1, 0, hashtext($2::uuid::text)::bigint & 65535, 'admission', "
    "'not-json', 'd', 't', 0, 0, 1, now())",
    "audit_logs": "INSERT INTO audit_logs (tenant_id, id, actor, action, subject, recorded_at) "
    "VALUES ($1, $2, 'a', 'b', 'c', now())",
}
READABLE = [*ROWS, "tenants"]


async def test_the_rows_here_cover_every_tenant_table(owner):
    tables = await owner.fetch(
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'tenant_id' AND table_schema = 'public'"
        " AND table_name NOT LIKE 'accepted%'"
    )
    assert {row[0] for row in tables} - {"outbox", "tenant_schemas", "tenant_slugs", "erasures"} == set(ROWS)


async def fill(pool, tenant_id):
    async with pool.tenant(tenant_id) as tx:
        for insert in ROWS.values():
            await tx.execute(insert, tenant_id, uuid.uuid4())


async def test_a_tenant_sees_its_own_rows_and_no_others(pool, create_tenant):
    mine, theirs = await create_tenant(), await create_tenant()
    await fill(pool, mine)
    await fill(pool, theirs)
    async with pool.tenant(mine) as tx:
        for table in READABLE:
            column = "id" if table == "tenants" else "tenant_id"
            owners = {str(row[0]) for row in await tx.fetch(f"SELECT {column} FROM {table}")}
            assert owners - {PLATFORM} == {mine}, table


async def test_without_a_context_there_are_no_rows(pool, create_tenant):
    tenant_id = await create_tenant()
    await fill(pool, tenant_id)
    async with pool.platform() as tx:
        for context in ("", PLATFORM):
            await tx.execute("SELECT set_config('app.tenant_id', $1, true)", context)
            for table in set(READABLE) - {"feature_flags", "audit_logs"}:
                assert await tx.fetchval(f"SELECT count(*) FROM {table}") == 0, (context, table)
        await tx.execute("SELECT set_config('app.tenant_id', '', true)")
        for table in ("feature_flags", "audit_logs"):
            assert await tx.fetchval(f"SELECT count(*) FROM {table}") == 0, table


@pytest.mark.parametrize("table", ROWS)
async def test_a_row_of_another_tenant_cannot_be_written(pool, create_tenant, table):
    mine, theirs = await create_tenant(), await create_tenant()
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.tenant(mine) as tx:
            await tx.execute(ROWS[table], theirs, uuid.uuid4())


async def test_a_row_cannot_be_given_to_another_tenant(pool, create_tenant):
    mine, theirs = await create_tenant(), await create_tenant()
    await fill(pool, mine)
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.tenant(mine) as tx:
            await tx.execute("UPDATE users SET tenant_id = $1", theirs)


async def test_another_tenants_rows_cannot_be_changed_or_deleted(pool, create_tenant):
    mine, theirs = await create_tenant(), await create_tenant()
    await fill(pool, theirs)
    async with pool.tenant(mine) as tx:
        assert await tx.execute("UPDATE users SET role = 'viewer' WHERE tenant_id = $1", theirs) == "UPDATE 0"
        assert await tx.execute("DELETE FROM users WHERE tenant_id = $1", theirs) == "DELETE 0"


async def test_a_forged_context_that_is_no_uuid_is_refused(pool, create_tenant):
    tenant_id = await create_tenant()
    for forged in ("' OR true --", "*", tenant_id + "'"):
        async with pool.tenant(tenant_id) as tx:
            await tx.execute("SELECT set_config('app.tenant_id', $1, true)", forged)
            with pytest.raises(asyncpg.InvalidTextRepresentationError):
                async with tx.transaction():
                    await tx.fetch("SELECT * FROM jobs")


async def test_everyone_reads_global_flags_and_only_the_platform_writes_them(pool, create_tenant):
    tenant_id = await create_tenant()
    flag = f"flag-{tenant_id}"
    write = ROWS["feature_flags"].replace("$2::uuid::text, 'tenant'", "$2, 'global'")
    async with pool.platform() as tx:
        await tx.execute(write, PLATFORM, flag)
    async with pool.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT enabled FROM feature_flags WHERE flag = $1", flag) is True
        assert await tx.execute("UPDATE feature_flags SET enabled = false WHERE flag = $1", flag) == "UPDATE 0"
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(write, PLATFORM, f"{flag}-2")


async def test_a_foreign_key_does_not_accept_another_tenants_row(pool, create_tenant):
    mine, theirs = await create_tenant(), await create_tenant()
    user = uuid.uuid4()
    async with pool.tenant(theirs) as tx:
        await tx.execute(ROWS["users"], theirs, user)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        async with pool.tenant(mine) as tx:
            await tx.execute(
                "INSERT INTO api_keys (tenant_id, id, key_hash, name, created_by) "
                "VALUES ($1, $2, sha256('k'), 'k', $3)",
                mine, uuid.uuid4(), user,
            )  # fmt: skip


async def test_unique_values_of_one_tenant_are_free_in_another(pool, create_tenant):
    for tenant_id in (await create_tenant(), await create_tenant()):
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(ROWS["users"], tenant_id, uuid.uuid4())


async def test_a_taken_slug_fails_and_its_registry_stays_closed(pool, create_tenant):
    slug = f"acme-{uuid.uuid4().hex[:12]}"
    tenant_id = await create_tenant(slug)
    with pytest.raises(asyncpg.UniqueViolationError, match="tenant_slugs"):
        await create_tenant(slug)
    for statement in (
        "SELECT * FROM tenant_slugs",
        "INSERT INTO tenant_slugs VALUES ('mine', $1)",
        "DELETE FROM tenant_slugs WHERE tenant_id = $1",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with pool.tenant(tenant_id) as tx:
                await tx.execute(statement, *([tenant_id] if "$1" in statement else []))


async def test_a_child_lies_under_the_root_of_its_parent(pool, create_tenant):
    root = await create_tenant()
    child = await create_tenant(parent=root)
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await create_tenant(parent=child)  # names its parent as root, which is none
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.tenant(child) as tx:
            await tx.execute("UPDATE tenants SET root_id = id, parent_id = NULL")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_logs SET actor = 'nobody'",
        "DELETE FROM audit_logs",
        "TRUNCATE audit_logs",
        "SELECT * FROM outbox",
        "DELETE FROM stream_positions",
        "CREATE TABLE mine ()",
        "CREATE TEMPORARY TABLE jobs ()",
        "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY",
        "SET LOCAL ROLE settler_services",
        "SET LOCAL ROLE postgres",
        "UPDATE schema_migrations SET checksum = ''",
    ],
)
async def test_what_the_services_may_not_do(pool, create_tenant, statement):
    tenant_id = await create_tenant()
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(statement)


async def test_positions_are_the_platforms_alone(pool, create_tenant):
    """A statement smuggled into a tenant's transaction must not make a consumer skip or repeat everybody's records."""
    tenant_id, consumer = await create_tenant(), uuid.uuid4().hex
    insert = "INSERT INTO stream_positions VALUES ($1, $2, 'topic', 0, 5)"
    async with pool.platform() as tx:
        await tx.execute(insert, consumer, uuid.uuid4())
    async with pool.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT count(*) FROM stream_positions") == 0
        assert await tx.execute("UPDATE stream_positions SET next_offset = 9") == "UPDATE 0"
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(insert, consumer, uuid.uuid4())
    async with pool.platform() as tx:
        assert await tx.fetchval("SELECT next_offset FROM stream_positions WHERE consumer = $1", consumer) == 5


async def test_switching_row_security_off_fails_instead_of_showing_rows(pool, create_tenant):
    tenant_id = await create_tenant()
    async with pool.tenant(tenant_id) as tx:
        await tx.execute("SET LOCAL row_security = off")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with tx.transaction():
                await tx.fetch("SELECT * FROM jobs")
