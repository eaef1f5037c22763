"""Erasure in Postgres: of one tenant every row, in batches, whoever is killed; and nobody else's, whatever is asked."""

from __future__ import annotations

import asyncio
import shutil
import uuid

import asyncpg
import msgspec
import pytest

from settler_streams.adapters.postgres import erasures, queries
from settler_streams.adapters.postgres.effects import JobDecision
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_rows import TenantRows
from settler_streams.adapters.postgres.tenant_schemas import move
from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.published import MIGRATIONS
from tests.adapters.postgres.test_postgres_isolation import ROWS

pytestmark = pytest.mark.services

WAIT_S_MAX = 60
ROWS_EACH = 3
FILLED = ROWS.keys() - {"tenant_children"}
"""A tenant that is to be erased has no children."""


async def fill(pool, tenant: TenantId) -> None:
    async with pool.tenant(tenant) as tx:
        for number in range(ROWS_EACH):
            for table in sorted(FILLED, key=lambda name: name == "webhook_deliveries"):
                statement = ROWS[table].replace("'a@b'", f"'{number}@b'").replace("a.example", f"{number}.example")
                await tx.execute(statement.replace("sha256('k')", f"sha256('{number}')"), tenant, uuid.uuid4())
        await tx.execute(
            """INSERT INTO api_keys (tenant_id, id, key_hash, name, created_by)
               SELECT tenant_id, $1, sha256('other'), 'k', id FROM users LIMIT 1""",
            uuid.uuid4(),
        )
        await tx.execute("INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, 't', 'k', '')", tenant)


@pytest.fixture
def deleted(pool, owner, create_tenant):
    """Makes a tenant with rows everywhere, deleted and past its grace period."""

    async def make(parent: TenantId | None = None, *, filled: bool = True) -> TenantId:
        tenant = await create_tenant(parent=parent)
        if filled:
            await fill(pool, tenant)
        await end_grace(owner, tenant)
        return tenant

    return make


async def end_grace(owner, tenant: TenantId, since: str = "now() - interval '1 second'") -> None:
    await owner.execute(
        f"UPDATE tenants SET status = 'deleted', erase_after = {since}, restored_as = 'active' WHERE id = $1", tenant
    )


async def tables_of(owner) -> list[tuple[str, str]]:
    """Every table of the shared schema that may say something of a tenant, by its tenant column."""
    return await owner.fetch(
        """SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT a.attisdropped
             AND (a.attname IN ('tenant_id', 'child_id') OR c.relname = 'tenants' AND a.attname = 'id')"""
    )


async def rows_of(owner, tenant: TenantId) -> dict[str, list[str]]:
    """All rows that name the tenant as theirs, or as their child, by table; empty tables are left out."""
    found = {
        f"{table}.{column}": [
            row[0]
            for row in await owner.fetch(f"SELECT t::text FROM {table} AS t WHERE {column} = $1 ORDER BY 1", tenant)
        ]
        for table, column in await tables_of(owner)
    }
    return {name: rows for name, rows in found.items() if rows}


async def erase(pool, tenant: TenantId, on_batch=lambda _table, _rows: None) -> erasures.Erasure:
    await erasures.begin(pool, tenant, "ann")
    await erasures.delete_rows(pool, tenant, on_batch)
    assert await erasures.rows_left(pool, tenant) == {}
    await erasures.end(pool, tenant)
    record = await erasures.read(pool, tenant)
    assert record is not None
    assert record.ended_at is not None
    return record


@pytest.mark.parametrize("own_schema", [False, True])
async def test_every_row_of_the_tenant_goes_and_no_other(database_settings, pool, owner, deleted, own_schema):
    tenant, other = await deleted(), await deleted()
    if own_schema:
        await move(database_settings, tenant, own_schema=True)
    others = await rows_of(owner, other)
    record = await erase(pool, tenant)
    assert list(await rows_of(owner, tenant)) == ["erasures.tenant_id"], "the record stays"
    assert await rows_of(owner, other) == others
    assert await owner.fetchval("SELECT to_regnamespace($1)", f"t_{tenant.replace('-', '')}") is None
    more = {"webhooks": 2 * ROWS_EACH, "api_keys": ROWS_EACH + 1}  # each delivery has a webhook of its own
    assert record.counts == {f"table/{table}": more.get(table, ROWS_EACH) for table in FILLED} | {
        "table/outbox": 1, "table/tenant_retention": 1,
    }  # fmt: skip
    assert (record.asked_by, record.root_id, record.version) == ("ann", tenant, 2)
    slug = f"t-{tenant}"
    again = TenantId(str(uuid.uuid4()))
    async with pool.tenant(again) as tx:
        await tx.execute(
            "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')", again, slug
        )


async def test_whoever_is_killed_after_any_batch_another_goes_on(pool, owner, deleted, monkeypatch):
    monkeypatch.setattr(erasures, "BATCH_ROWS_MAX", 1)
    tenant, other = await deleted(), await deleted()
    others, deaths = await rows_of(owner, other), 0
    before = sum(len(rows) for rows in (await rows_of(owner, tenant)).values())

    def dying(table: str, rows: int) -> None:
        nonlocal deaths
        if rows and table != "tenants":
            deaths += 1
            raise KeyboardInterrupt

    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            try:
                record = await erase(pool, tenant, dying)
            except KeyboardInterrupt:
                continue
            break
    assert deaths == sum(record.counts.values()) == before - len(["tenants", "tenant_slugs"])
    assert list(await rows_of(owner, tenant)) == ["erasures.tenant_id"]
    assert await rows_of(owner, other) == others


@pytest.mark.parametrize("own_schema", [False, True])
async def test_two_at_once_count_each_row_once(database_settings, pool, owner, deleted, monkeypatch, own_schema):
    monkeypatch.setattr(erasures, "BATCH_ROWS_MAX", 2)
    tenant = await deleted()
    rows = sum(len(rows) for rows in (await rows_of(owner, tenant)).values()) - len(["tenants", "tenant_slugs"])
    if own_schema:
        await move(database_settings, tenant, own_schema=True)
    one, two = await asyncio.gather(erase(pool, tenant), erase(pool, tenant))
    assert sum(one.counts.values()) == rows
    assert one == two


async def test_one_that_another_has_overtaken_finds_nothing_left_in_a_schema_that_is_gone(
    database_settings, pool, deleted, monkeypatch
):
    tenant = await deleted()
    await move(database_settings, tenant, own_schema=True)
    listed, records = erasures._tables, []

    async def overtaken(tx, tenant_id):
        tables = await listed(tx, tenant_id)
        monkeypatch.setattr(erasures, "_tables", listed)
        records.append(await erase(pool, tenant))
        return tables

    monkeypatch.setattr(erasures, "_tables", overtaken)
    records.append(await erase(pool, tenant))
    assert records[0] == records[1]


async def test_only_a_tenant_that_is_due_can_be_erased(pool, owner, create_tenant, deleted):
    active, in_grace, parent = await create_tenant(), await create_tenant(), await create_tenant()
    await end_grace(owner, in_grace, "now() + interval '1 day'")
    child = await deleted(parent, filled=False)
    await owner.execute("INSERT INTO tenant_children VALUES ($1, $2)", parent, child)
    await end_grace(owner, parent)
    nobody = TenantId(str(uuid.uuid4()))
    for tenant, error, why in (
        (active, ConflictError, "is active; only what was deleted"),
        (in_grace, ConflictError, "can be restored until"),
        (parent, ConflictError, f"has a child, {child}; erase that first"),
        (nobody, NotFoundError, "no tenant"),
    ):
        with pytest.raises(error, match=why):
            await erasures.begin(pool, tenant, "ann")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with pool.eraser(tenant) as tx:
                await tx.execute(queries.BEGIN_ERASURE, tenant, tenant, 2, "ann")
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="is not being erased"):
            async with pool.eraser(tenant) as tx:
                await tx.execute(queries.FORGET_TENANT)
    await erase(pool, child)
    await erase(pool, parent)
    assert list(await rows_of(owner, parent)) == list(await rows_of(owner, child)) == ["erasures.tenant_id"]


@pytest.mark.parametrize("own_schema", [False, True])
async def test_an_erased_child_leaves_its_parents_list_wherever_that_is(
    database_settings, pool, owner, create_tenant, deleted, own_schema
):
    parent = await create_tenant()
    child = await deleted(parent)
    await owner.execute("INSERT INTO tenant_children VALUES ($1, $2)", parent, child)
    if own_schema:
        await move(database_settings, parent, own_schema=True)
    await erase(pool, child)
    async with pool.tenant(parent) as tx:
        assert await tx.fetch("SELECT * FROM tenant_children") == []
        assert await tx.fetchval("SELECT count(*) FROM tenants") == 1


@pytest.mark.parametrize("table", sorted(FILLED | {"outbox", "tenant_children"}))
async def test_the_eraser_sees_and_deletes_nothing_of_a_tenant_that_is_not_being_erased(pool, owner, deleted, table):
    tenant, erased = await deleted(), await deleted(filled=False)
    await owner.execute("INSERT INTO tenant_children VALUES ($1, $2)", tenant, uuid.uuid4())
    await erasures.begin(pool, erased, "ann")
    before = await rows_of(owner, tenant)
    async with pool.eraser(tenant) as tx:
        assert await tx.execute(f"DELETE FROM {table}") == "DELETE 0"
        if table != "tenant_children":
            assert await tx.fetch(f"SELECT * FROM {table} WHERE tenant_id <> $1", PLATFORM) == []
    async with pool.eraser(erased) as tx:
        assert await tx.execute(f"DELETE FROM {table} WHERE tenant_id = $1", tenant) == "DELETE 0"
    assert await rows_of(owner, tenant) == before


@pytest.mark.parametrize("statement", [
    "UPDATE jobs SET kind = 'x'", "INSERT INTO users (tenant_id) SELECT tenant_id FROM jobs", "DELETE FROM tenants",
    "DELETE FROM erasures", "UPDATE erasures SET asked_by = 'x'", "DELETE FROM tenant_schemas",
    "SELECT * FROM tenant_slugs", "DELETE FROM tenant_slugs", "TRUNCATE jobs", "UPDATE tenants SET status = 'deleted'",
    "UPDATE stream_positions SET next_offset = 0", "DROP TABLE jobs",
])  # fmt: skip
async def test_the_eraser_can_do_nothing_else(pool, deleted, statement):
    tenant = await deleted(filled=False)
    await erasures.begin(pool, tenant, "ann")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.eraser(tenant) as tx:
            await tx.execute(statement)


@pytest.mark.parametrize("statement", [
    "INSERT INTO erasures (tenant_id, root_id, version, asked_by) SELECT id, id, 2, 'x' FROM tenants",
    "UPDATE erasures SET ended_at = NULL", "DELETE FROM erasures", "SELECT forget_tenant()",
    "SELECT enter_erasure(NULL)", "DELETE FROM audit_logs", "DELETE FROM jobs",
])  # fmt: skip
async def test_a_service_that_is_not_the_eraser_cannot_erase(pool, deleted, statement):
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.tenant(await deleted(filled=False)) as tx:
            await tx.execute(statement)


async def test_the_record_of_an_erasure_that_has_ended_stays_as_it_is(pool, owner, deleted):
    tenant = await deleted()
    record = await erase(pool, tenant)
    await erasures.add_count(pool, tenant, "table/jobs", 7)
    await erasures.step_done(pool, tenant, "more")
    await erasures.end(pool, tenant)
    assert await erasures.read(pool, tenant) == record
    assert await erasures.begin(pool, tenant, "ben") == record


async def test_from_its_beginning_on_no_door_opens_for_the_tenant(database_settings, pool, deleted):
    tenant = await deleted()
    await erasures.begin(pool, tenant, "ann")
    for door in (pool.tenant, pool.janitor):
        with pytest.raises(NotFoundError, match="was erased"):
            async with door(tenant):
                pytest.fail("the door has opened")
    with pytest.raises(NotFoundError, match="was erased"):
        async with TenantRows.open(database_settings, tenant):
            pytest.fail("it can be exported")
    with pytest.raises(NotFoundError, match="was erased"):
        await move(database_settings, tenant, own_schema=True)
    async with pool.platform() as tx:
        assert await tx.fetchval("SELECT current_setting('app.tenant_id')") == PLATFORM, "the pool is as it was"


async def test_an_erasure_begins_when_the_transactions_of_the_tenant_have_ended(pool, deleted):
    tenant = await deleted()
    async with pool.tenant(tenant) as tx:
        beginning = asyncio.create_task(erasures.begin(pool, tenant, "ann"))
        await waits_for_a_lock(tx)
        assert not beginning.done()
        await tx.execute(ROWS["jobs"], tenant, uuid.uuid4())
    await beginning
    await erasures.delete_rows(pool, tenant, lambda _table, _rows: None)
    record = await erasures.read(pool, tenant)
    assert record is not None
    assert record.counts["table/jobs"] == ROWS_EACH + 1


async def waits_for_a_lock(tx) -> None:
    """Until somebody waits for an advisory lock of this database."""
    async with asyncio.timeout(WAIT_S_MAX):
        while not await tx.fetchval(  # noqa: ASYNC110 - the server tells nobody
            "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))"
        ):
            await asyncio.sleep(0)


async def test_what_projections_learn_late_of_an_erased_tenant_is_passed_over(pool, owner, create_tenant, deleted):
    tenant, other = await deleted(), await create_tenant()
    await erase(pool, tenant)
    job = str(uuid.uuid4())
    batch = {
        each: {"job_decision": [JobDecision(
            tenant_id=each, job_id=job, kind="k", priority="low", decision="admitted", requested_at_ms=1,
            decided_at_ms=2, source_version=1,
        )]} for each in (tenant, other)
    }  # fmt: skip
    async with pool.platform() as tx:
        await tx.execute(queries.PROJECT_BATCH, msgspec.json.encode(batch).decode())
        assert await tx.fetchval("SELECT current_setting('app.tenant_id')") == PLATFORM
        assert await tx.fetchval("SHOW search_path") == "public, pg_temp"
    assert list(await rows_of(owner, tenant)) == ["erasures.tenant_id"]
    assert (await rows_of(owner, other)).keys() >= {"jobs.tenant_id"}


async def test_a_migration_reaches_the_schema_of_a_tenant_that_is_being_erased(
    new_database, tmp_path, owner_connection
):
    """A later one may drop what the policies there would still call."""
    files = shutil.copytree(MIGRATIONS, tmp_path / "migrations")
    settings = new_database()
    await migrate(settings, directory=files)
    pool = await TenantConnectionPool.open(settings)
    tenants = [TenantId(str(uuid.uuid4())) for _ in range(2)]
    for tenant in tenants:
        async with pool.tenant(tenant) as tx:
            await tx.execute(
                "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
                tenant, f"t-{tenant}",
            )  # fmt: skip
            await tx.execute(queries.CREATE_TENANT_SCHEMA)
    async with owner_connection(settings) as owner:
        await end_grace(owner, tenants[0])
        await erasures.begin(pool, tenants[0], "ann")
        last = int(max(files.glob("*.sql")).name[:4])
        (files / f"{last + 1:04d}_more.sql").write_text("-- scope: tenant\nALTER TABLE users ADD COLUMN more text;\n")
        await migrate(settings, directory=files)
        layouts = await owner.fetch("SELECT tenant_id::text, layout FROM tenant_schemas")
        assert dict(layouts) == dict.fromkeys(tenants, last + 1)
    await erase(pool, tenants[0])
    await pool.close()
