"""Migrations undone: the earlier schema to the last grant, by any number of processes, and never at data's expense."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import uuid

import asyncpg
import pytest
from pydantic import SecretStr

from settler_streams.adapters.postgres import erasures, migrations_back, queries, tenant_schemas
from settler_streams.adapters.postgres.inventory import inventory
from settler_streams.adapters.postgres.migration_files import BACK, TENANT_SCOPE, read_migrations
from settler_streams.adapters.postgres.migrations import Migrated, migrate, migrate_to
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_schemas import differences, move, schemas
from settler_streams.errors import ConfigurationError, ConflictError
from settler_streams.ids import TenantId
from settler_streams.published import MIGRATIONS
from tests.adapters.postgres.test_postgres_erasure import end_grace, erase
from tests.adapters.postgres.test_postgres_tenant_schemas import fill

pytestmark = pytest.mark.services

FILES = read_migrations(MIGRATIONS)
NAMES = [file.name for file in FILES]
STOPS = [0, *(file.version for file in FILES)]
ERASURES, LIFECYCLE, SCHEMAS = 16, 15, 14
"""The migration that brought erasures, the one with tables in tenants' schemas, and the one that brought these."""

# Beside what the inventory says: columns in their order, and the text of every function.
COLUMNS = """
SELECT format('column %s of %s: %s %s, not null %s, default %s, identity %s, generated %s', a.attname, c.relname,
              row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod),
              a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity, a.attgenerated)
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


@pytest.fixture
def files(tmp_path):
    """A copy of the migrations, to change."""
    return shutil.copytree(MIGRATIONS, tmp_path / "migrations")


async def catalogue(connection):
    return await inventory(connection) + sorted(row[0] for row in await connection.fetch(COLUMNS))


def test_every_migration_has_a_file_that_undoes_it_of_the_same_scope_and_none_has_two():
    assert sorted(path.name for path in (MIGRATIONS / BACK).iterdir()) == NAMES
    assert [file.sql.startswith(TENANT_SCOPE) for file in FILES] == [
        file.back.startswith(TENANT_SCOPE) for file in FILES
    ]


async def test_each_step_back_is_the_schema_of_each_step_forward(new_database, owner_connection):
    settings = new_database()
    await migrate_to(settings, 0)
    forward = {}
    async with owner_connection(settings) as owner:
        for before, stop in itertools.pairwise(STOPS):
            forward[before] = await catalogue(owner)
            assert await migrate_to(settings, stop) == Migrated(
                [name for name in NAMES if name[:4] == f"{stop:04}"], []
            )
        forward[STOPS[-1]] = await catalogue(owner)
        assert len({tuple(lines) for lines in forward.values()}) == len(STOPS), "each migration changes something"

        for stop in reversed(STOPS[:-1]):
            undone = next(file.name for file in FILES if file.version > stop)
            assert await migrate_to(settings, stop) == Migrated([], [undone])
            assert await catalogue(owner) == forward[stop], f"back at {stop}"
        assert await owner.fetchval("SELECT count(*) FROM schema_migrations") == 0
        assert await migrate(settings) == NAMES
        assert await catalogue(owner) == forward[STOPS[-1]]
        assert await migrate_to(settings, 0) == Migrated([], NAMES[::-1])
        assert await catalogue(owner) == forward[0]


async def test_two_processes_go_back_once_and_others_forward_after_them(new_database, owner_connection):
    settings = new_database()
    await migrate(settings)
    program = (
        "import asyncio; from settler_streams.settings import Settings;"
        "from settler_streams.adapters.postgres.migrations import migrate_to;"
        "print(*asyncio.run(migrate_to(Settings.from_environment(), 0)).undone)"
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env=settings.environment(), stdout=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = await asyncio.gather(*(process.communicate() for process in processes))
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(name for out, _ in outputs for name in out.decode().split()) == NAMES

    both_ways = await asyncio.gather(migrate(settings), migrate_to(settings, 0), migrate(settings))
    first, back, second = both_ways
    async with owner_connection(settings) as owner:
        there = await owner.fetchval("SELECT count(*) FROM schema_migrations")
    assert there == len(first) + len(second) - len(back.undone)
    assert there in (0, len(NAMES))


async def test_a_migration_that_nothing_undoes_is_named_before_anything_is_undone(
    new_database, files, owner_connection
):
    settings = new_database()
    await migrate(settings, directory=files)
    (files / BACK / NAMES[2]).unlink()
    async with owner_connection(settings) as owner:
        before = await catalogue(owner)
        with pytest.raises(ConfigurationError, match=f"nothing goes back without back/{NAMES[2]};"):
            await migrate_to(settings, 0, directory=files)
        assert await catalogue(owner) == before
    undone = (await migrate_to(settings, FILES[2].version, directory=files)).undone
    assert undone == NAMES[:2:-1], "it is not needed for that"


@pytest.mark.parametrize("to", [1000, 10])
async def test_a_number_that_no_migration_has_is_refused(new_database, to):
    with pytest.raises(ConfigurationError, match=f"no migration has the number {to}"):
        await migrate_to(new_database(), to)


async def new_tenant(pool, parent=None):
    tenant = TenantId(str(uuid.uuid4()))
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "INSERT INTO tenants (id, parent_id, root_id, slug, name, tier) VALUES ($1, $2, $3, $4, 'A', 'free')",
            tenant, parent, parent or tenant, f"t-{tenant}",
        )  # fmt: skip
    return tenant


async def invite(pool, tenant):
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            """INSERT INTO users (tenant_id, id, email, role, status, invitation_hash, invitation_expires_at)
               VALUES ($1, $2, 'new@example', 'member', 'invited', sha256('token'), now())""",
            tenant, uuid.uuid4(),
        )  # fmt: skip


async def test_data_is_counted_and_refused_then_discarded_when_told_to(new_database, owner_connection):
    settings = new_database()
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    tenant, own = await new_tenant(pool), await new_tenant(pool)
    for each in (tenant, own):
        async with pool.tenant(each) as tx:
            await fill(tx, each)
        await invite(pool, each)
    await move(settings, own, own_schema=True)
    await pool.close()
    async with owner_connection(settings) as owner:
        before = await catalogue(owner)
        with pytest.raises(ConflictError) as refused:
            await migrate_to(settings, SCHEMAS)
        assert "users (invitation_expires_at, invitation_hash): 2 rows" in str(refused.value), "in both schemas"
        assert "tenant_children: 2 rows" in str(refused.value)
        assert "--discard-data" in str(refused.value)
        with pytest.raises(ConflictError, match=r"schemas of their own \(1\).* without 0014.* shared"):
            await migrate_to(settings, 0, discard_data=True)
        assert await catalogue(owner) == before

        told = []
        moved = await migrate_to(settings, SCHEMAS, discard_data=True, progress=lambda *at: told.append(at))
        assert (moved.undone, told) == ([name for name in reversed(NAMES) if int(name[:4]) > SCHEMAS], [(1, 1)])
        invited = "SELECT email, status, password_hash FROM {}.users WHERE email = 'new@example'"
        for schema in ("public", await owner.fetchval(queries.SCHEMA_OF, own)):
            assert await owner.fetch(invited.format(schema)) == [("new@example", "invited", "!")]
        await migrate(settings)
        assert await differences(owner, await owner.fetchval(queries.SCHEMA_OF, own)) == []
        assert await catalogue(owner) == before

        await move(settings, own, own_schema=False)
        before = [line for line in before if "schema t_" not in line]
        with pytest.raises(ConflictError, match=r"jobs: \d+ rows.*webhooks: \d+ rows"):
            await migrate_to(settings, 0)
        with pytest.raises(ConflictError, match=r"webhooks \(.*secret_key_id\): 4 rows"):
            await migrate_to(settings, 9)
        assert await migrate_to(settings, 9, discard_data=True)
        assert await owner.fetchval("SELECT count(*) FROM users") > 0
        await migrate(settings)
        assert (await migrate_to(settings, 0, discard_data=True)).undone == NAMES[::-1]
        await migrate(settings)
        assert await catalogue(owner) == before


async def test_going_back_half_way_with_the_schemas_goes_on_in_both_directions(new_database, files, owner_connection):
    """What a kill between the schemas of tenants and the shared one leaves behind."""
    settings = new_database()
    await migrate(settings, directory=files)
    pool = await TenantConnectionPool.open(settings)
    parents = [await new_tenant(pool) for _ in range(2)]
    children = {parent: await new_tenant(pool, parent) for parent in parents}
    for parent, child in children.items():
        async with pool.tenant(parent) as tx:
            await tx.execute("INSERT INTO tenant_children (tenant_id, child_id) VALUES ($1, $2)", parent, child)
        await move(settings, parent, own_schema=True)
    lifecycle = next(files / BACK / name for name in NAMES if name.startswith(f"{LIFECYCLE:04}"))
    works = lifecycle.read_text()
    lifecycle.write_text(works + "SELECT 1 / 0;")
    async with owner_connection(settings) as owner:
        before = await catalogue(owner)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate_to(settings, SCHEMAS, discard_data=True, directory=files)
        assert await catalogue(owner) == before
        lifecycle.write_text(works)

        class KilledError(Exception):
            pass

        def killed(done, _of):
            if done == 1:
                raise KilledError

        for go_on in (migrate_to(settings, None, directory=files), migrate_to(settings, SCHEMAS, discard_data=True)):
            with pytest.raises(KilledError):
                await migrate_to(settings, SCHEMAS, discard_data=True, directory=files, progress=killed)
            assert await owner.fetchval("SELECT array_agg(layout ORDER BY layout) FROM tenant_schemas") == [
                SCHEMAS, FILES[-1].version,
            ]  # fmt: skip
            await go_on
            await migrate(settings, directory=files)
            for parent, child in children.items():
                schema = await owner.fetchval(queries.SCHEMA_OF, parent)
                assert await differences(owner, schema) == []
                assert await owner.fetch(f"SELECT tenant_id::text, child_id::text FROM {schema}.tenant_children") == [
                    (parent, child)
                ]
            assert await catalogue(owner) == before
    await pool.close()


@pytest.mark.parametrize("to", [ERASURES, SCHEMAS])
async def test_a_tenant_that_is_being_erased_keeps_no_migration_from_being_undone(new_database, owner_connection, to):
    """Beyond the migration that brought erasures, there is none any more: it has to be asked for again."""
    settings = new_database()
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    tenants = [await new_tenant(pool) for _ in range(2)]
    for tenant in tenants:
        await move(settings, tenant, own_schema=True)
    async with owner_connection(settings) as owner:
        await end_grace(owner, tenants[0])
        await erasures.begin(pool, tenants[0], "ann")
        before = await catalogue(owner)
        await migrate_to(settings, to, discard_data=True)
        assert await owner.fetch("SELECT layout FROM tenant_schemas") == [(to,), (to,)]
        await migrate(settings)
        assert await catalogue(owner) == before
        for tenant in tenants:
            assert await differences(owner, await owner.fetchval(queries.SCHEMA_OF, tenant)) == []
        await end_grace(owner, tenants[0])
        await erase(pool, tenants[0])
    await pool.close()


async def test_a_schema_that_goes_with_its_tenant_before_its_turn_is_passed_over(
    new_database, owner_connection, monkeypatch
):
    settings = new_database()
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    tenants = [await new_tenant(pool) for _ in range(2)]
    for tenant in tenants:
        await move(settings, tenant, own_schema=True)
    async with owner_connection(settings) as owner:
        page = [name async for name in schemas(owner)]
        await end_grace(owner, tenants[0])
        await erase(pool, tenants[0])

        async def read_before(_connection):
            for name in page:
                yield name

        monkeypatch.setattr(migrations_back, "schemas", read_before)
        monkeypatch.setattr(tenant_schemas, "schemas", read_before)
        for to in (ERASURES, FILES[-1].version):
            await migrate_to(settings, to)
            assert await owner.fetch("SELECT tenant_id::text, layout FROM tenant_schemas") == [(tenants[1], to)]
    await pool.close()


async def test_what_is_written_behind_the_count_is_found_in_the_step_that_would_delete_it(
    new_database, owner_connection, monkeypatch
):
    settings = new_database()
    await migrate_to(settings, LIFECYCLE)
    pool = await TenantConnectionPool.open(settings)
    tenant, other = await new_tenant(pool), await new_tenant(pool)
    await move(settings, tenant, own_schema=True)
    schemas_back = migrations_back._schemas_back

    async def written_behind(*arguments, **more):
        await schemas_back(*arguments, **more)
        await invite(pool, other)

    async with owner_connection(settings) as owner:
        before = await catalogue(owner)
        with monkeypatch.context() as patch:
            patch.setattr(migrations_back, "_schemas_back", written_behind)
            with pytest.raises(ConflictError, match=r"users \(invitation_expires_at, invitation_hash\): 1 rows"):
                await migrate_to(settings, SCHEMAS)
        assert await catalogue(owner) == before
        assert await owner.fetchval("SELECT count(*) FROM users WHERE invitation_hash IS NOT NULL") == 1
        await migrate(settings)
        assert await differences(owner, await owner.fetchval(queries.SCHEMA_OF, tenant)) == []
    await pool.close()


NEEDED = """-- scope: tenant
DO $$ BEGIN IF current_schema() = 'public' THEN
    CREATE FUNCTION always() RETURNS boolean LANGUAGE sql RETURN true;
    GRANT EXECUTE ON FUNCTION always() TO settler_services;
END IF; END $$;
CREATE POLICY needs ON users USING (public.always());
ALTER TABLE users ADD COLUMN more text;
"""
NEEDED_BACK = """-- scope: tenant
ALTER TABLE users DROP COLUMN more;
DROP POLICY needs ON users;
DO $$ BEGIN IF current_schema() = 'public' THEN DROP FUNCTION always(); END IF; END $$;
"""


@pytest.mark.parametrize("own_schema", [True, False])
async def test_a_function_that_tenants_schemas_need_goes_after_them(new_database, files, owner_connection, own_schema):
    settings, last = new_database(), FILES[-1].version
    (files / "9999_needed.sql").write_text(NEEDED)
    (files / BACK / "9999_needed.sql").write_text(NEEDED_BACK)
    await migrate_to(settings, last, directory=files)
    pool = await TenantConnectionPool.open(settings)
    tenant = await new_tenant(pool)
    await invite(pool, tenant)
    await move(settings, tenant, own_schema=True)
    other = await new_tenant(pool)
    await invite(pool, other)
    async with owner_connection(settings) as owner:
        before = await catalogue(owner)
        await migrate(settings, directory=files)
        async with pool.tenant(tenant if own_schema else other) as tx:
            await tx.execute("UPDATE users SET more = 'data'")
        with pytest.raises(ConflictError, match=r"users \(more\): 1 rows"):
            await migrate_to(settings, last, directory=files)
        assert await owner.fetchval("SELECT count(*) FROM schema_migrations") == len(FILES) + 1
        assert (await migrate_to(settings, last, directory=files, discard_data=True)).undone == ["9999_needed.sql"]
        assert await catalogue(owner) == before
        assert await differences(owner, await owner.fetchval(queries.SCHEMA_OF, tenant)) == []
    await pool.close()


async def test_an_owner_that_is_no_superuser_counts_every_tenants_rows(new_database, owner):
    name = f"managed_{uuid.uuid4().hex}"
    await owner.execute(
        f"CREATE ROLE {name} LOGIN CREATEDB CREATEROLE PASSWORD 'managed';"
        f"GRANT settler_services, settler_relay, settler_courier, settler_janitor, settler_eraser TO {name} "
        "WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
    )
    settings = new_database().model_copy(
        update={"db_user": name, "db_password": SecretStr("managed"), "db_app_user": f"{name}_app"}
    )
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    tenants = [await new_tenant(pool) for _ in range(2)]
    for tenant in tenants:
        await invite(pool, tenant)
    await move(settings, tenants[0], own_schema=True)
    await pool.close()
    with pytest.raises(ConflictError, match=r"users \(invitation_expires_at, invitation_hash\): 2 rows"):
        await migrate_to(settings, SCHEMAS)
    await migrate_to(settings, SCHEMAS, discard_data=True)
    await move(settings, tenants[0], own_schema=False)
    with pytest.raises(ConflictError, match=r"users: 2 rows"):
        await migrate_to(settings, 0)
    assert (await migrate_to(settings, 0, discard_data=True)).undone[-1] == NAMES[0]
