"""Migrations: once, in order, from any number of processes, and never silently different."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import uuid

import asyncpg
import pytest
from pydantic import SecretStr

from settler_streams.adapters.postgres import outbox
from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.migrations import migrate, read_migrations
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import ConfigurationError
from settler_streams.ids import TenantId
from settler_streams.published import MIGRATIONS

pytestmark = pytest.mark.services

NAMES = [path.name for path in sorted(MIGRATIONS.glob("*.sql"))]


@pytest.fixture
def files(tmp_path):
    return shutil.copytree(MIGRATIONS, tmp_path / "migrations")


async def test_a_second_run_applies_nothing(new_database):
    settings = new_database()
    assert await migrate(settings) == NAMES
    assert await migrate(settings) == []


async def test_runs_at_the_same_time_apply_each_migration_once(new_database):
    first, second = new_database(), new_database()
    applied = await asyncio.gather(*(migrate(settings) for settings in (first, second) for _ in range(4)))
    assert sorted(itertools.chain(*applied[:4])) == NAMES
    assert sorted(itertools.chain(*applied[4:])) == NAMES


async def test_two_processes_apply_each_migration_once(new_database):
    settings = new_database()
    program = (
        "import asyncio; from settler_streams.settings import Settings;"
        "from settler_streams.adapters.postgres.migrations import migrate;"
        "print(*asyncio.run(migrate(Settings.from_environment())))"
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


async def test_a_changed_file_is_refused(new_database, files):
    settings = new_database()
    await migrate(settings, directory=files)
    path = files / NAMES[2]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigurationError, match=f"{NAMES[2]} was changed"):
        await migrate(settings, directory=files)


async def test_a_missing_file_is_refused(new_database, files):
    settings = new_database()
    await migrate(settings, directory=files)
    for name in (NAMES[-1], NAMES[1]):
        (files / name).unlink()
        with pytest.raises(ConfigurationError, match="its file is not here"):
            await migrate(settings, directory=files)


async def test_a_number_below_an_applied_one_is_refused(new_database, files):
    settings = new_database()
    (files / NAMES[0]).rename(files / "0000_first.sql")
    await migrate(settings, directory=files)
    (files / "0001_late.sql").write_text("SELECT 1")
    with pytest.raises(ConfigurationError, match=r"0001_late.sql is numbered below"):
        await migrate(settings, directory=files)


async def test_a_failing_migration_leaves_nothing_of_itself(new_database, files, owner_connection):
    settings = new_database()
    (files / "9999_broken.sql").write_text("CREATE TABLE half (); SELECT 1 / 0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(settings, directory=files)
    async with owner_connection(settings) as connection:
        assert await connection.fetchval("SELECT to_regclass('half')") is None
        assert await connection.fetchval("SELECT max(version) FROM schema_migrations") == int(NAMES[-1][:4])
    (files / "9999_broken.sql").write_text("SELECT 1;")
    assert await migrate(settings, directory=files) == ["9999_broken.sql"]


@pytest.mark.parametrize("name", ["1_short.sql", "0008-dash.sql", "0001_taken.sql"])
def test_a_malformed_or_taken_number_is_refused(files, name):
    (files / name).write_text("SELECT 1")
    with pytest.raises(ConfigurationError, match=r"named like|is taken by"):
        read_migrations(files)


@pytest.mark.parametrize(
    "name", ["postgres", "settler_services", "settler_relay", "settler_courier", "settler_janitor", "settler_eraser"]
)
async def test_an_application_role_that_is_not_its_own_is_refused(database_settings, name):
    with pytest.raises(ConfigurationError, match="DB_APP_USER"):
        await migrate(database_settings.model_copy(update={"db_app_user": name}))


async def test_the_application_role_is_named_and_secured_from_the_settings(new_database, owner_connection):
    name = 'app "quoted"; DROP'
    settings = new_database().model_copy(
        update={"db_app_user": name, "db_app_password": SecretStr('it\'s \\ "all" %s here; --')}
    )
    await migrate(settings)
    async with owner_connection(settings) as connection:
        await connection.execute(f"""ALTER ROLE "{name.replace('"', '""')}" BYPASSRLS CREATEDB""")
        await migrate(settings)  # takes back what the role must not have
        role = await connection.fetchrow("SELECT * FROM pg_roles WHERE rolname = $1", name)
    assert not any(role[f"rol{attribute}"] for attribute in ("super", "bypassrls", "createdb", "createrole"))
    pool = await TenantConnectionPool.open(settings)
    async with pool.platform() as tx:
        assert await tx.fetchval("SELECT current_user") == name
    await pool.close()


async def test_an_owner_that_is_no_superuser_migrates_and_is_bound_itself(new_database, owner, owner_connection):
    """As on a managed server, where nobody is a superuser."""
    name = f"managed_{uuid.uuid4().hex}"
    await owner.execute(
        f"CREATE ROLE {name} LOGIN CREATEDB CREATEROLE PASSWORD 'managed';"
        # Whoever creates the groups may grant them; in this cluster they exist already.
        f"GRANT settler_services, settler_relay, settler_courier, settler_janitor, settler_eraser TO {name} "
        "WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
    )
    settings = new_database().model_copy(
        update={"db_user": name, "db_password": SecretStr("managed"), "db_app_user": f"{name}_app"}
    )
    assert await migrate(settings) == NAMES
    tenant_id, child_id = TenantId(str(uuid.uuid4())), TenantId(str(uuid.uuid4()))
    insert = "INSERT INTO tenants (id, parent_id, root_id, slug, name, tier) VALUES ($1, $2, $3, $4, 'A', 'free')"
    pool = await TenantConnectionPool.open(settings)
    async with pool.tenant(tenant_id) as tx:
        await tx.execute(insert, tenant_id, None, tenant_id, "parent")
        await outbox.append(tx, tenant_id, "t", tenant_id, b"1")
    async with pool.tenant(child_id) as tx:
        await tx.execute(insert, child_id, tenant_id, tenant_id, "child")
    async with pool.relay() as tx:
        assert [event.event for event in await outbox.pending(tx, 10)] == [b"1"]
    await pool.close()
    async with owner_connection(settings) as connection:
        assert await violations(connection) == []
        assert await connection.fetchval("SELECT count(*) FROM tenants") == 0
