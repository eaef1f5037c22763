"""Schemas of single tenants: the layout of the shared one, moved in and out with every row, migrated all together."""

from __future__ import annotations

import asyncio
import shutil
import uuid

import asyncpg
import msgspec
import pytest

from settler_streams.adapters.postgres import queries, tenant_schemas
from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.effects import JobDecision, QuotaUsage
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_rows import TenantRows
from settler_streams.adapters.postgres.tenant_schemas import differences, move, tenant_of
from settler_streams.errors import ConfigurationError, NotFoundError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.published import MIGRATIONS
from tests.adapters.postgres.test_postgres_erasure import waits_for_a_lock
from tests.adapters.postgres.test_postgres_isolation import ROWS

pytestmark = pytest.mark.services

TABLES = sorted(ROWS.keys() - {"feature_flags", "webhook_lanes"})


async def fill(tx, tenant: TenantId) -> None:
    """A row in every table of the tenant, and a key of a user."""
    for statement in ROWS.values():
        await tx.execute(statement, tenant, uuid.uuid4())
    await tx.execute("UPDATE users SET email = 'b@c'")
    await tx.execute(
        """INSERT INTO api_keys (tenant_id, id, key_hash, name, created_by)
           SELECT tenant_id, $1, sha256('other'), 'k', id FROM users""",
        uuid.uuid4(),
    )


async def seen(pool: TenantConnectionPool, tenant: TenantId) -> dict[str, list[str]]:
    """Every row that the tenant sees, by table."""
    async with pool.tenant(tenant) as tx:
        return {table: sorted(row[0] for row in await tx.fetch(f"SELECT t::text FROM {table} AS t")) for table in ROWS}


async def schema_of(owner, tenant: TenantId) -> str | None:
    return await owner.fetchval(queries.SCHEMA_OF, tenant)


async def rows_in(owner, schema: str, tenant: TenantId) -> dict[str, int]:
    return {
        table: await owner.fetchval(f"SELECT count(*) FROM {schema}.{table} WHERE tenant_id = $1", tenant)
        for table in TABLES
    }


async def test_a_tenant_moves_into_a_schema_of_its_own_and_back_with_every_row(
    database_settings, pool, owner, create_tenant
):
    tenant, other = await create_tenant(), await create_tenant()
    for each in (tenant, other):
        async with pool.tenant(each) as tx:
            await fill(tx, each)
    before, others = await seen(pool, tenant), await seen(pool, other)
    assert min(map(len, before.values())) >= 1

    moved = await move(database_settings, tenant, own_schema=True)
    schema = await schema_of(owner, tenant)
    assert tenant_of(schema) == tenant
    assert moved == sum((await rows_in(owner, schema, tenant)).values()) == sum(len(before[table]) for table in TABLES)
    assert set((await rows_in(owner, "public", tenant)).values()) == {0}
    assert await seen(pool, tenant) == before
    assert await seen(pool, other) == others
    assert await differences(owner, schema) == []

    assert await move(database_settings, tenant, own_schema=True) == 0, "it is there already"
    assert await move(database_settings, tenant, own_schema=False) == moved
    assert await schema_of(owner, tenant) is None
    assert await owner.fetchval("SELECT to_regnamespace($1)", schema) is None
    assert await seen(pool, tenant) == before


async def test_what_is_written_after_a_move_lies_in_the_tenants_schema(database_settings, pool, owner, create_tenant):
    tenant, other = await create_tenant(), await create_tenant()
    await move(database_settings, tenant, own_schema=True)
    job = str(uuid.uuid4())
    batch = [
        effect
        for each in (tenant, other)
        for effect in (
            JobDecision(tenant_id=each, job_id=job, kind="k", priority="low", decision="admitted", requested_at_ms=1,
                        decided_at_ms=2, source_version=1),
            QuotaUsage(tenant_id=each, quota_type="storage", used=1, reserved=0, source_version=1),
        )
    ]  # fmt: skip
    async with pool.platform() as tx:
        await project(tx, batch)
        assert await tx.fetchval("SHOW search_path") == "public, pg_temp", "the caller's path is as it was"
    schema = await schema_of(owner, tenant)
    for table in ("jobs", "tenant_quota_usage"):
        assert await owner.fetch(f"SELECT tenant_id::text FROM {schema}.{table}") == [(tenant,)]
        assert await owner.fetchval(f"SELECT count(*) FROM public.{table} WHERE tenant_id = $1", tenant) == 0
        assert await owner.fetchval(f"SELECT count(*) FROM public.{table} WHERE tenant_id = $1", other) == 1


async def project(tx, effects) -> None:
    batch: dict[str, dict[str, list]] = {}
    for effect in effects:
        batch.setdefault(effect.tenant_id, {}).setdefault(effect.KIND, []).append(effect)
    await tx.execute(queries.PROJECT_BATCH, msgspec.json.encode(batch).decode())


async def test_another_tenant_cannot_see_into_a_schema_even_by_its_name(database_settings, pool, owner, create_tenant):
    tenant, other = await create_tenant(), await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    await move(database_settings, tenant, own_schema=True)
    schema = await schema_of(owner, tenant)
    async with pool.tenant(other) as tx:
        for table in TABLES:
            assert await tx.fetchval(f"SELECT count(*) FROM {schema}.{table}") == 0
        assert await tx.fetchval("SELECT count(*) FROM tenant_schemas") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await tx.execute(
                f"INSERT INTO {schema}.users (tenant_id, id, email, password_hash, role)"
                f" VALUES ('{tenant}', '{uuid.uuid4()}', 'x@y', 'h', 'owner')"
            )


async def test_a_move_that_cannot_finish_leaves_everything_where_it_was(
    database_settings, pool, owner, create_tenant, monkeypatch
):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    before = await seen(pool, tenant)
    monkeypatch.setattr(tenant_schemas, "MOVE_LOCK_WAIT", "200ms")
    async with pool.tenant(tenant):  # a transaction of the tenant is under way
        with pytest.raises(UnavailableError):
            await move(database_settings, tenant, own_schema=True)
    assert (await schema_of(owner, tenant), await seen(pool, tenant)) == (None, before)

    await owner.execute(f"CREATE SCHEMA t_{tenant.replace('-', '')}")
    with pytest.raises(asyncpg.DuplicateSchemaError):
        await move(database_settings, tenant, own_schema=True)
    await owner.execute(f"DROP SCHEMA t_{tenant.replace('-', '')}")
    assert (await schema_of(owner, tenant), await seen(pool, tenant)) == (None, before)


async def test_writers_wait_for_a_move_and_nothing_that_they_wrote_is_left_behind(
    database_settings, pool, owner, create_tenant
):
    tenant = await create_tenant()
    written = 0
    stop = asyncio.Event()

    async def write() -> None:
        nonlocal written
        while not stop.is_set():
            async with pool.tenant(tenant) as tx:
                await tx.execute(ROWS["jobs"], tenant, uuid.uuid4())
            written += 1

    writers = [asyncio.create_task(write()) for _ in range(3)]
    for own_schema in (True, False, True, False, True):
        await move(database_settings, tenant, own_schema=own_schema)
    stop.set()
    await asyncio.gather(*writers)
    assert len((await seen(pool, tenant))["jobs"]) == written > 0
    assert await owner.fetchval("SELECT count(*) FROM public.jobs WHERE tenant_id = $1", tenant) == 0


@pytest.mark.parametrize("own_schema", [True, False])
async def test_a_snapshot_that_has_to_wait_for_a_move_is_of_the_moment_after_it(
    database_settings, pool, owner, create_tenant, own_schema
):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    if not own_schema:
        await move(database_settings, tenant, own_schema=True)
    lines: dict[str, int] = {}

    async def export() -> None:
        async with TenantRows.open(database_settings, tenant) as rows:
            lines.update({table: await rows.copy(table, drop, secrets=True) for table in TABLES})

    async def drop(_chunk: bytes) -> None:
        pass

    async def begin_it(_tx, _moved: int) -> None:
        begun.append(asyncio.create_task(export()))
        await waits_for_a_lock(owner)

    begun: list[asyncio.Task[None]] = []
    moved = await move(database_settings, tenant, own_schema=own_schema, note=begin_it)
    await begun[0]
    assert sum(lines.values()) == moved
    assert min(lines.values()) > 0


async def test_no_tenant_shares_its_lock_with_the_platform(pool, owner):
    """Whoever moved or erased one that did stopped every recorder, relay and courier meanwhile."""
    shared = await owner.fetchval(
        """SELECT id FROM (SELECT lpad(to_hex(n), 32, '0')::uuid AS id FROM generate_series(1, 100000) AS n) AS tenants
           WHERE hashtextextended(id::text, 0) & 1023 = hashtextextended($1, 0) & 1023 LIMIT 1""",
        PLATFORM,
    )
    async with owner.transaction():
        await owner.execute(queries.LOCK_TENANT_SCHEMA, shared)
        for door in (pool.platform, pool.relay, pool.courier):
            async with door() as tx:
                assert await tx.fetchval("SELECT current_setting('app.tenant_id')") == PLATFORM


async def test_a_tenant_that_does_not_exist_is_not_moved(database_settings):
    with pytest.raises(NotFoundError, match="no tenant"):
        await move(database_settings, TenantId(str(uuid.uuid4())), own_schema=True)


@pytest.mark.parametrize(("change", "noticed"), [
    ("ALTER TABLE {}.jobs DISABLE ROW LEVEL SECURITY", "of its own: ALTER TABLE jobs DISABLE ROW LEVEL SECURITY"),
    ("ALTER TABLE {}.jobs NO FORCE ROW LEVEL SECURITY", "missing: ALTER TABLE jobs ENABLE ROW LEVEL SECURITY, FORCE"),
    ("DROP POLICY tenant_rows_only ON {}.users", "missing: CREATE POLICY tenant_rows_only ON users"),
    ("ALTER TABLE {}.users ADD COLUMN more text", "of its own: CREATE TABLE users"),
    ("GRANT TRUNCATE ON {}.users TO settler_services", "of its own: GRANT TRUNCATE ON users TO settler_services"),
    ("DROP INDEX {}.jobs_by_status", "missing: CREATE INDEX jobs_by_status"),
    ("ALTER TABLE {}.api_keys DROP CONSTRAINT api_keys_tenant_id_created_by_fkey", "missing: ALTER TABLE api_keys"),
    ("DROP VIEW {}.accepted_matches", "missing: CREATE VIEW accepted_matches"),
    ("ALTER TABLE {}.reports ALTER matches DROP NOT NULL", "of its own: CREATE TABLE reports"),
    ("ALTER VIEW {}.accepted_reports RESET (security_invoker)", "missing: CREATE VIEW accepted_reports"),
    ("CREATE TABLE {}.more (tenant_id uuid)", "of its own: CREATE TABLE more"),
    ("CREATE TABLE {}.more (id uuid)", "of its own: table {}.more"),
    ("CREATE MATERIALIZED VIEW {}.more AS SELECT 1", "of its own: materialized view {}.more"),
    ("CREATE FUNCTION {}.instant(bigint) RETURNS timestamptz LANGUAGE sql RETURN now()", "of its own: function {}.i"),
    ("CREATE RULE more AS ON DELETE TO {}.jobs DO INSTEAD NOTHING", "of its own: rule more on table {}.jobs"),
    ("ALTER TABLE {}.jobs OWNER TO settler_courier", "of its own: jobs OWNER TO settler_courier"),
    ("GRANT CREATE ON SCHEMA {} TO settler_services", "of its own: GRANT CREATE ON SCHEMA TO settler_services"),
    ("GRANT USAGE ON SCHEMA {} TO PUBLIC", "of its own: GRANT USAGE ON SCHEMA TO PUBLIC"),
    ("GRANT SELECT ON {}.jobs TO settler_services WITH GRANT OPTION", "of its own: GRANT SELECT ON jobs TO settler_"),
    ("GRANT UPDATE (job_id) ON {}.accepted_matches TO settler_relay", "of its own: GRANT UPDATE ON accepted_matches."),
    ("ALTER DEFAULT PRIVILEGES IN SCHEMA {} GRANT SELECT ON TABLES TO PUBLIC", "of its own: default privileges on new"),
])  # fmt: skip
async def test_a_layout_that_differs_is_noticed(database_settings, owner, create_tenant, change, noticed):
    tenant = await create_tenant()
    await move(database_settings, tenant, own_schema=True)
    schema = await schema_of(owner, tenant)
    transaction = owner.transaction()
    await transaction.start()
    await owner.execute(change.format(schema))
    assert any(text.startswith(noticed.format(schema)) for text in await differences(owner, schema))
    await transaction.rollback()
    assert await differences(owner, schema) == []


async def test_a_schema_keeps_every_rule_of_isolation(database_settings, owner, create_tenant):
    tenant = await create_tenant()
    await move(database_settings, tenant, own_schema=True)
    transaction = owner.transaction()
    await transaction.start()
    await owner.execute(f"SET LOCAL search_path = {await schema_of(owner, tenant)}, public, pg_temp")
    beyond = [found for found in await violations(owner) if "_tenant_id_fkey; " not in found]
    assert beyond == [], "but for the keys that refer to the tenants, who are not in this schema"
    await transaction.rollback()


@pytest.fixture
def files(tmp_path):
    """A copy of the migrations, to add to."""
    return shutil.copytree(MIGRATIONS, tmp_path / "migrations")


async def test_all_schemas_follow_a_new_migration_and_one_that_forgets_them_is_refused(
    new_database, files, owner_connection
):
    settings = new_database()
    await migrate(settings, directory=files)
    tenants = []
    async with owner_connection(settings) as owner:
        pool = await TenantConnectionPool.open(settings)
        for _ in range(3):
            tenant = TenantId(str(uuid.uuid4()))
            async with pool.tenant(tenant) as tx:
                await tx.execute(
                    "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
                    tenant, f"t-{tenant}",
                )  # fmt: skip
                await tx.execute(queries.CREATE_TENANT_SCHEMA)
            tenants.append(tenant)
        last = int(max(files.glob("*.sql")).name[:4])
        new = files / f"{last + 1:04d}_more.sql"
        new.write_text("-- scope: tenant\nALTER TABLE users ADD COLUMN more text;\n")
        told = []
        assert await migrate(settings, directory=files, progress=lambda done, of: told.append((done, of))) == [new.name]
        assert told == [(1, 3), (2, 3), (3, 3)]
        for tenant in tenants:
            assert await differences(owner, await schema_of(owner, tenant)) == []
        assert await migrate(settings, directory=files) == []

        forgetful = files / f"{last + 2:04d}_forgetful.sql"
        forgetful.write_text("ALTER TABLE users ADD COLUMN even_more text;\n")
        with pytest.raises(ConfigurationError, match=r"differs from the shared one: .*even_more"):
            await migrate(settings, directory=files)
        await pool.close()


async def test_no_schema_is_made_or_dropped_while_the_database_is_migrated(
    database_settings, pool, owner, create_tenant
):
    """One that is made could be of the layout before, and be overlooked by what brings all schemas to the new one; one
    that is dropped would be missing when its turn comes."""
    tenant, with_schema = await create_tenant(), await create_tenant()
    await move(database_settings, with_schema, own_schema=True)
    await owner.execute(queries.SERIALISE_MIGRATION)
    with pytest.raises(UnavailableError, match="is being migrated"):
        async with pool.tenant(tenant) as tx:
            await tx.execute(queries.CREATE_TENANT_SCHEMA)
    for each, own_schema in ((tenant, True), (with_schema, False)):
        with pytest.raises(UnavailableError, match="is being migrated"):
            await move(database_settings, each, own_schema=own_schema)
    await owner.execute("SELECT pg_advisory_unlock_all()")
    async with pool.tenant(tenant) as tx:
        await tx.execute(queries.CREATE_TENANT_SCHEMA)
        migration = asyncio.create_task(migrate(database_settings))
        await waits_for_a_lock(owner)
    await migration
    assert await differences(owner, await schema_of(owner, tenant)) == []


async def test_a_service_makes_a_schema_for_its_context_alone_and_once(pool, owner, create_tenant):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await tx.execute(queries.CREATE_TENANT_SCHEMA)
    with pytest.raises(asyncpg.UniqueViolationError):
        async with pool.tenant(tenant) as tx:
            await tx.execute(queries.CREATE_TENANT_SCHEMA)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        async with pool.tenant(TenantId(str(uuid.uuid4()))) as tx:
            await tx.execute(queries.CREATE_TENANT_SCHEMA)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.tenant(tenant) as tx:
            await tx.execute(queries.MOVE_TENANT_ROWS, "public", await schema_of(owner, tenant))


async def test_children_who_were_there_before_are_known_to_their_parents_wherever_these_are(
    new_database, files, owner_connection
):
    settings = new_database()
    later = [path for path in files.glob("*.sql") if int(path.name[:4]) >= 15]
    for path in later:
        path.rename(files.parent / path.name)
    await migrate(settings, directory=files)
    roots, children = [TenantId(str(uuid.uuid4())) for _ in range(2)], []
    async with owner_connection(settings) as owner:
        pool = await TenantConnectionPool.open(settings)
        for root in roots:
            child = TenantId(str(uuid.uuid4()))
            for tenant, parent in ((root, None), (child, root)):
                async with pool.tenant(tenant) as tx:
                    await tx.execute(
                        "INSERT INTO tenants (id, parent_id, root_id, slug, name, tier) "
                        "VALUES ($1, $2, $3, $4, 'A', 'free')", tenant, parent, root, f"t-{tenant}",
                    )  # fmt: skip
            children.append(child)
        await move(settings, roots[1], own_schema=True)
        for path in later:
            (files.parent / path.name).rename(path)
        await migrate(settings, directory=files)
        for root, child in zip(roots, children, strict=True):
            async with pool.tenant(root) as tx:
                assert [str(row[0]) for row in await tx.fetch("SELECT child_id FROM tenant_children")] == [child]
        schema = await schema_of(owner, roots[1])
        assert await owner.fetchval(f"SELECT count(*) FROM {schema}.tenant_children") == 1
        assert await owner.fetchval("SELECT count(*) FROM public.tenant_children") == 1
        await pool.close()
