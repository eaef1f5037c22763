"""Processes that move a tenant's schema, or migrate all of them, killed by the kernel; and more schemas than a page."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import sys
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor

import asyncpg
import pytest

from settler_streams.adapters.postgres import migrations, queries, tenant_schemas
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_schemas import differences
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId
from settler_streams.published import MIGRATIONS
from settler_streams.services import move_tenant
from tests.adapters.postgres.test_postgres_tenant_schemas import TABLES, fill, rows_in, schema_of, seen

pytestmark = pytest.mark.services

WAITS_WITHIN_S = 60.0
"""A process starts in a second or two, on a busy machine in more."""

# Dies at the `nth` statement that begins as told: before it is sent, while the server is at it, or when it is answered.
PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
import asyncpg
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.services import move_tenant
from settler_streams.settings import Settings

task, argument, when, statement, nth = sys.argv[1:]
left = int(nth)

def dying(method):
    async def call(self, query, *arguments, **more):
        global left
        left -= query.strip().startswith(statement)
        if left:
            return await method(self, query, *arguments, **more)
        left = -1
        if when != "before":
            answer = asyncio.ensure_future(method(self, query, *arguments, **more))
            for _ in range(3):
                await asyncio.sleep(0)  # it is on its way
            if when == "after":
                await answer
        os.kill(os.getpid(), signal.SIGKILL)
    return call

for name in ("execute", "fetchval", "fetch"):
    setattr(asyncpg.Connection, name, dying(getattr(asyncpg.Connection, name)))
settings = Settings.from_environment()
if task == "migrate":
    asyncio.run(migrate(settings, directory=Path(argument)))
else:
    asyncio.run(move_tenant(settings, argument, own_schema=task == "own"))
"""


async def killed(settings, task: str, argument: object, when: str, statement: str, nth: int = 1) -> None:
    process = await started(settings, task, argument, when, statement, nth)
    assert await process.wait() == -signal.SIGKILL


async def started(settings, task: str, argument: object, when: str, statement: str, nth: int = 1):
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, task, str(argument), when, statement, str(nth),
        env={**os.environ, **settings.environment()},
    )  # fmt: skip


@pytest.mark.parametrize(("when", "statement", "moved"), [
    ("after", queries.CREATE_TENANT_SCHEMA, False),
    ("while", queries.MOVE_TENANT_ROWS, False),
    ("after", queries.MOVE_TENANT_ROWS, False),
    ("before", "COMMIT", False),
    ("after", "COMMIT", True),
])  # fmt: skip
async def test_a_move_that_is_killed_leaves_all_rows_in_one_place_and_is_run_again(
    database_settings, pool, owner, create_tenant, when, statement, moved
):
    await there_and_back(database_settings, pool, owner, create_tenant, when, statement, moved, own_schema=True)


@pytest.mark.parametrize(("when", "statement", "moved"), [
    ("while", queries.MOVE_TENANT_ROWS, False),
    ("after", queries.FORGET_SCHEMA, False),
    ("after", "DROP SCHEMA", False),
    ("before", "COMMIT", False),
    ("after", "COMMIT", True),
])  # fmt: skip
async def test_a_move_back_that_is_killed_leaves_all_rows_in_one_place_and_is_run_again(
    database_settings, pool, owner, create_tenant, when, statement, moved
):
    await there_and_back(database_settings, pool, owner, create_tenant, when, statement, moved, own_schema=False)


async def there_and_back(settings, pool, owner, create_tenant, when, statement, moved, *, own_schema):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    if not own_schema:
        await move_tenant(settings, tenant, own_schema=True)
    before = await seen(pool, tenant)
    await killed(settings, "own" if own_schema else "shared", tenant, when, statement)
    await goes_on(settings, pool, owner, tenant, before, moved, own_schema=own_schema)


async def goes_on(settings, pool, owner, tenant, before, moved, *, own_schema):
    """All rows are there once, where they were or where they should be, and the next call does what is left."""
    await ended(owner, tenant)
    assert await lies_in_own_schema(owner, tenant) is (own_schema is moved)
    rows = await seen(pool, tenant)
    assert len(rows.pop("audit_logs")) == len(before.pop("audit_logs")) + moved
    assert rows == before
    assert (await move_tenant(settings, tenant, own_schema=own_schema) > 0) is not moved
    assert await lies_in_own_schema(owner, tenant) is own_schema
    assert {**await seen(pool, tenant), "audit_logs": []} == {**before, "audit_logs": []}
    async with pool.tenant(tenant) as tx:
        moves = await tx.fetchval("SELECT count(*) FROM audit_logs WHERE action = 'tenant.moved'")
    assert moves == 1 + (not own_schema), "each move is told once"


@pytest.mark.parametrize("own_schema", [True, False])
async def test_a_move_that_is_killed_with_all_rows_copied_and_some_deleted_keeps_each_once(
    database_settings, pool, owner, owner_connection, create_tenant, own_schema
):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    if not own_schema:
        await move_tenant(database_settings, tenant, own_schema=True)
    before = await seen(pool, tenant)
    source = await schema_of(owner, tenant) or "public"
    async with owner_connection(database_settings) as holder, holder.transaction():
        # Users are deleted after all that refers to them.
        await holder.execute(f"SELECT FROM {source}.users WHERE tenant_id = $1 FOR UPDATE", tenant)
        process = await started(database_settings, "own" if own_schema else "shared", tenant, "before", "nothing")
        assert queries.MOVE_TENANT_ROWS in await waiting_for(owner, holder)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    await goes_on(database_settings, pool, owner, tenant, before, moved=False, own_schema=own_schema)


@pytest.mark.parametrize("own_schema", [True, False])
async def test_a_move_that_stands_still_is_ended_and_holds_up_nobody(
    database_settings, pool, owner, owner_connection, create_tenant, monkeypatch, own_schema
):
    tenant = await create_tenant()
    async with pool.tenant(tenant) as tx:
        await fill(tx, tenant)
    if not own_schema:
        await move_tenant(database_settings, tenant, own_schema=True)
    before = await seen(pool, tenant)

    async def take_lock() -> None:
        async with owner_connection(database_settings) as another:
            await another.execute(f"SET lock_timeout = '{WAITS_WITHIN_S}s'")
            await ended(another, tenant)

    async def stand_still(_tx, moved: int) -> None:
        """With its whole event loop, until somebody else has had the tenant's lock."""
        assert moved
        with ThreadPoolExecutor(1) as aside:
            aside.submit(asyncio.run, take_lock()).result()

    with monkeypatch.context() as patch:
        patch.setattr(tenant_schemas, "IDLE_MAX", "1s")
        with pytest.raises(UnavailableError, match="idle-in-transaction timeout"):
            await tenant_schemas.move(database_settings, tenant, own_schema=own_schema, note=stand_still)
    await goes_on(database_settings, pool, owner, tenant, before, moved=False, own_schema=own_schema)


async def test_an_owner_whose_machine_vanishes_is_given_up_within_half_a_minute(database_settings):
    async with tenant_schemas.owner_connection(database_settings) as owner:
        limits = [
            await owner.fetchval(f"SHOW {name}")  # what the operating system says of the connection, not what was asked
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout")
        ]
    assert limits == ["10", "5", "3", "30000"]


async def waiting_for(owner, holder) -> str:
    """The statement that waits for what ``holder`` has locked, once one does."""
    statement = None
    async with asyncio.timeout(WAITS_WITHIN_S):
        while statement is None:
            statement = await owner.fetchval(
                "SELECT query FROM pg_stat_activity WHERE $1 = ANY (pg_blocking_pids(pid))", holder.get_server_pid()
            )
    return statement


async def ended(owner, tenant: TenantId) -> None:
    """Returns when the server has ended the transaction of the killed process."""
    async with owner.transaction():
        await owner.execute(queries.LOCK_TENANT_SCHEMA, tenant)


async def lies_in_own_schema(owner, tenant: TenantId) -> bool:
    """Whether every row does; it fails if some do, or if a schema is left, or missing."""
    schema = await schema_of(owner, tenant)
    made = f"t_{tenant.replace('-', '')}"
    assert schema in (None, made)
    assert (await owner.fetchval("SELECT to_regnamespace($1)", made) is None) is (schema is None)
    if schema is None:
        return False
    assert set((await rows_in(owner, "public", tenant)).values()) == {0}
    assert min((await rows_in(owner, schema, tenant)).values()) >= 1, TABLES
    assert await differences(owner, schema) == []
    return True


@pytest.fixture
def files(tmp_path):
    """The migrations, and a later one that is not applied."""
    directory = shutil.copytree(MIGRATIONS, tmp_path / "migrations")
    (directory / "9999_more.sql").write_text("-- scope: tenant\nALTER TABLE users ADD COLUMN more text;\n")
    return directory


async def with_schemas(settings, number: int) -> list[TenantId]:
    """So many tenants with schemas of their own."""
    await migrate(settings)
    tenants = []
    pool = await TenantConnectionPool.open(settings)
    for _ in range(number):
        tenant = TenantId(str(uuid.uuid4()))
        async with pool.tenant(tenant) as tx:
            await tx.execute(
                "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
                tenant, f"t-{tenant}",
            )  # fmt: skip
            await tx.execute(queries.CREATE_TENANT_SCHEMA)
        tenants.append(tenant)
    await pool.close()
    return sorted(tenants)


@pytest.mark.parametrize(("when", "statement", "nth", "done"), [
    ("before", queries.SCHEMAS_COUNT, 1, 0),
    ("after", queries.RECORD_LAYOUT, 1, 0),
    ("before", queries.LAYOUT_OF, 2, 1),
    ("after", queries.RECORD_LAYOUT, 3, 2),
])  # fmt: skip
async def test_a_migration_that_is_killed_between_schemas_goes_on_where_it_was(
    new_database, files, owner_connection, when, statement, nth, done
):
    settings = new_database()
    tenants = await with_schemas(settings, 3)
    await killed(settings, "migrate", files, when, statement.strip(), nth)
    pool = await TenantConnectionPool.open(settings)
    async with owner_connection(settings) as owner:
        await owner.execute(queries.SERIALISE_MIGRATION)  # which the killed one had until the server ended its session
        layouts = [await owner.fetchval("SELECT layout FROM tenant_schemas WHERE tenant_id = $1", t) for t in tenants]
        assert [layout == 9999 for layout in layouts] == [place < done for place in range(3)]
        for tenant, layout in zip(tenants, layouts, strict=True):
            assert bool(await differences(owner, await schema_of(owner, tenant))) == (layout != 9999)
            async with pool.tenant(tenant) as tx:  # works meanwhile, in either layout
                await tx.execute("INSERT INTO users (tenant_id, id, email, password_hash, role)"
                                 " VALUES ($1, $1, 'a@b', 'h', 'owner')", tenant)  # fmt: skip
        await owner.execute("SELECT pg_advisory_unlock_all()")
        told = []
        assert await migrate(settings, directory=files, progress=lambda *of: told.append(of)) == []
        assert told == [(1, 3), (2, 3), (3, 3)]
        for tenant in tenants:
            assert await differences(owner, await schema_of(owner, tenant)) == []
            async with pool.tenant(tenant) as tx:
                assert await tx.fetch("SELECT email, more FROM users") == [("a@b", None)]
    await pool.close()


async def test_a_migration_that_stands_still_is_ended_and_goes_on_where_it_was(
    new_database, files, owner_connection, monkeypatch
):
    settings = new_database()
    tenant = (await with_schemas(settings, 1))[0]
    stood_still = []

    async def stand_still(connection, schema: str) -> None:
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        await asyncio.wait_for(lost.wait(), WAITS_WITHIN_S)
        stood_still.append(schema)

    with monkeypatch.context() as patch:
        patch.setattr(migrations, "IDLE_MAX", "1s")
        patch.setattr(tenant_schemas, "_refuse_differences", stand_still)
        with pytest.raises(UnavailableError, match="connection to PostgreSQL was lost"):
            await migrate(settings, directory=files)
    async with owner_connection(settings) as owner:
        schema = await schema_of(owner, tenant)
        assert stood_still == [schema]
        assert await differences(owner, schema), "the shared one has the new column, this one not"
        assert await migrate(settings, directory=files) == []
        assert await differences(owner, schema) == []


async def test_more_schemas_than_a_page_are_migrated_in_memory_that_does_not_grow(
    new_database, files, owner_connection, monkeypatch
):
    monkeypatch.setattr(tenant_schemas, "PAGE", 6)
    settings = new_database()
    tenants = await with_schemas(settings, 25)
    told, held, pages = [], [], []
    fetch = asyncpg.Connection.fetch

    async def watched(self, query, *arguments, **more):
        rows = await fetch(self, query, *arguments, **more)
        if query == queries.SCHEMAS_AFTER:
            pages.append(len(rows))
        return rows

    def progress(done: int, of: int) -> None:
        told.append((done, of))
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "fetch", watched)
        tracemalloc.start()
        try:
            await migrate(settings, directory=files, progress=progress)
        finally:
            tracemalloc.stop()
    assert told == [(done, 25) for done in range(1, 26)]
    assert pages == [6, 6, 6, 6, 1, 0]
    # What is cached for the statements is there after the second page; no schema leaves anything behind.
    assert max(held[12:]) - max(held[6:12]) < 20_000, held
    async with owner_connection(settings) as owner:
        assert [name async for name in tenant_schemas.schemas(owner)] == [
            await schema_of(owner, tenant) for tenant in tenants
        ]
        for tenant in (tenants[0], tenants[5], tenants[6], tenants[-1]):
            assert await differences(owner, await schema_of(owner, tenant)) == []


async def test_the_command_shows_how_many_schemas_are_done(new_database, tmp_path):
    settings = new_database()
    await with_schemas(settings, 3)
    environment = {**os.environ, **settings.environment(), "FORCE_COLOR": "1", "SETTLER_STATE_DIR": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "settler_streams.cli.main", "migrate", env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, shown = await process.communicate()
    assert (process.returncode, b"nothing to do" in printed) == (0, True)
    assert b"schemas of tenants" in shown
    assert b"100%" in shown
