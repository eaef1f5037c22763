"""The read pool on a real hot standby: what is read there, by whom, how late, and what happens when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
import pytest_asyncio

from settler_streams.adapters.postgres import erasures
from settler_streams.adapters.postgres import pool as pools
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.adapters.postgres.tenant_schemas import move
from settler_streams.dev.stack.folders import make_folder
from settler_streams.dev.stack.postgres import SUPERUSER, Postgres
from settler_streams.dev.stack.probes import postgres_answers
from settler_streams.errors import NotFoundError, UnavailableError
from settler_streams.ids import TenantId
from settler_streams.services import NoisyNeighborDetection, TenantDirectory
from settler_streams.settings import Settings
from tests.adapters.postgres.conftest import owner_of
from tests.adapters.postgres.test_postgres_erasure import end_grace
from tests.adapters.postgres.test_postgres_isolation import READABLE, fill

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(not psutil.LINUX, reason="loopback has one address alone, and both servers need the same port"),
]

HOST = "127.0.0.2"
"""A read host is asked on the port of the primary."""
WAIT_S_MAX = 60.0
IN_RECOVERY = "SELECT pg_is_in_recovery()"


class Standby(Postgres):
    """A server that was copied from a running primary, and follows it."""

    def __init__(self, home: Path, primary: Settings) -> None:
        self._primary = primary
        super().__init__(home, primary.db_port, primary.db_password.get_secret_value())

    @property
    def environ(self) -> dict[str, str]:
        return super().environ | {"PGPASSWORD": self._password}

    def command(self) -> list[str]:
        return [*super().command(), f"--listen_addresses={HOST}"]

    def answers(self) -> bool:
        return postgres_answers(HOST, self.port, SUPERUSER, self._password)

    def _initialise(self) -> None:
        make_folder(self.data, 0o700)
        if self._account is not None:
            os.chown(self.data, self._account.uid, self._account.gid)
        source = f"host={self._primary.db_host} port={self.port} user={SUPERUSER}"
        options = ("--write-recovery-conf", "--checkpoint=fast", "--no-sync")
        self._run("pg_basebackup", f"--pgdata={self.data}", f"--dbname={source}", *options, cwd=self.data)


@pytest.fixture(scope="module")
def standby(cluster_settings: Settings) -> Iterator[Standby]:
    with tempfile.TemporaryDirectory(prefix="settler-standby-") as name:
        Path(name).chmod(0o755)
        server = Standby(Path(name) / "standby", cluster_settings)
        try:
            server.start()
            server.wait_ready()
            yield server
        finally:
            server.kill()
            shutil.rmtree(server.home)


@pytest.fixture
def reading_settings(database_settings: Settings, standby: Standby) -> Settings:
    return database_settings.model_copy(update={"db_read_host": HOST, "db_pool_wait_ms": 60_000})


@pytest_asyncio.fixture
async def pool(reading_settings: Settings, follower: asyncpg.Connection) -> AsyncIterator[TenantConnectionPool]:
    """Takes the place of the one without a replica."""
    pool = await TenantConnectionPool.open(reading_settings)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def follower(
    reading_settings: Settings, standby: Standby, owner: asyncpg.Connection
) -> AsyncIterator[asyncpg.Connection]:
    """The owner on the standby, which by now has the module's database."""
    standby.start()
    standby.wait_ready()
    async with owner_of(reading_settings.model_copy(update={"db_host": HOST, "db_name": "postgres"})) as connection:
        await _caught_up(connection, owner)
    async with owner_of(reading_settings.model_copy(update={"db_host": HOST})) as connection:
        yield connection


async def _caught_up(follower: asyncpg.Connection, owner: asyncpg.Connection) -> None:
    """Until the standby has replayed all that was committed."""
    end = await owner.fetchval("SELECT pg_current_wal_insert_lsn()::text")
    async with asyncio.timeout(WAIT_S_MAX):
        while not await follower.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", end):
            pass


@contextlib.asynccontextmanager
async def _held_back(follower: asyncpg.Connection, owner: asyncpg.Connection) -> AsyncIterator[None]:
    """The standby receives what is committed, and does not replay it; all of it afterwards."""
    await follower.execute("SELECT pg_wal_replay_pause()")
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            while await follower.fetchval("SELECT pg_get_wal_replay_pause_state()") != "paused":
                pass
        yield
    finally:
        await follower.execute("SELECT pg_wal_replay_resume()")
    await _caught_up(follower, owner)


async def _name(pool: TenantConnectionPool, tenant_id: TenantId, *, read_only: bool) -> str:
    async with pool.tenant(tenant_id, read_only=read_only) as tx:
        return str(await tx.fetchval("SELECT name FROM tenants WHERE id = $1", tenant_id))


async def _rename(pool: TenantConnectionPool, tenant_id: TenantId, name: str) -> None:
    async with pool.tenant(tenant_id) as tx:
        await tx.execute("UPDATE tenants SET name = $2 WHERE id = $1", tenant_id, name)


async def test_reads_go_to_the_standby_and_everything_else_to_the_primary(pool, create_tenant):
    tenant_id = await create_tenant()
    async with pool.tenant(tenant_id, read_only=True) as reading, pool.tenant(tenant_id) as writing:
        assert await reading.fetchval(IN_RECOVERY) is True
        assert await writing.fetchval(IN_RECOVERY) is False
    async with pool.platform() as tx:
        assert await tx.fetchval(IN_RECOVERY) is False


async def test_row_level_security_holds_on_the_standby(pool, owner, follower, create_tenant, reading_settings):
    mine, theirs = await create_tenant(), await create_tenant()
    await fill(pool, mine)
    await fill(pool, theirs)
    await _caught_up(follower, owner)
    async with pool.tenant(mine, read_only=True) as tx:
        for table in READABLE:
            column = "id" if table == "tenants" else "tenant_id"
            rows = f"SELECT count(*) FROM {table} WHERE {column} = $1"
            assert await follower.fetchval(rows, theirs) > 0, table  # there they are
            assert await tx.fetchval(rows, mine) > 0, table
            assert await tx.fetchval(rows, theirs) == 0, table
    login = reading_settings.model_copy(
        update={
            "db_host": HOST,
            "db_user": reading_settings.db_app_user,
            "db_password": reading_settings.db_app_password,
        }
    )
    async with owner_of(login) as services:
        assert await TenantContext.read(services) is None
        for table in READABLE:
            assert await services.fetchval(f"SELECT count(*) FROM {table}") == 0, table


async def test_nothing_is_written_through_the_read_pool(pool, owner, follower, create_tenant):
    tenant_id = await create_tenant()
    await _caught_up(follower, owner)
    for statement in ("UPDATE tenants SET name = 'B'", "SELECT id FROM tenants FOR UPDATE"):
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError, match="read-only transaction"):
            async with pool.tenant(tenant_id, read_only=True) as tx:
                await tx.execute(statement)
    with pytest.raises(asyncpg.PostgresError, match="read-write mode"):
        async with pool.tenant(tenant_id, read_only=True) as tx:
            await tx.execute("SET TRANSACTION READ WRITE")
    with pytest.raises(asyncpg.PostgresError, match="during recovery"):  # nor by its owner, on a standby
        async with follower.transaction():
            await follower.execute("SET TRANSACTION READ WRITE")
    assert await _name(pool, tenant_id, read_only=False) == "A"


async def test_who_has_written_may_read_what_was_before(pool, owner, follower, create_tenant):
    tenant_id = await create_tenant()
    await _caught_up(follower, owner)
    async with _held_back(follower, owner):
        await _rename(pool, tenant_id, "B")
        assert await _name(pool, tenant_id, read_only=True) == "A"
        assert await _name(pool, tenant_id, read_only=False) == "B"
    assert await _name(pool, tenant_id, read_only=True) == "B"


async def test_who_reads_while_a_move_is_replayed_gets_every_row_or_is_told_to_read_again(
    reading_settings, pool, owner, follower, create_tenant
):
    tenant_id, other = await create_tenant(), await create_tenant()
    await fill(pool, tenant_id)
    await _caught_up(follower, owner)
    found = []

    async def read_while_moving(moved: TenantId, *, own_schema: bool) -> int:
        async with pool.tenant(tenant_id, read_only=True) as tx:
            await move(reading_settings, moved, own_schema=own_schema)
            await _caught_up(follower, owner)
            found.append(await tx.fetchval("SELECT count(*) FROM jobs"))
            return found[-1]

    rows = await read_while_moving(other, own_schema=True)
    assert rows > 0
    with pytest.raises(UnavailableError, match="was moved while it was read"):
        await read_while_moving(tenant_id, own_schema=True)
    assert found[-1] == 0, "it had looked where the rows had been"
    assert await read_while_moving(other, own_schema=False) == rows
    assert await read_while_moving(tenant_id, own_schema=False) == rows


async def test_an_erased_tenant_is_refused_once_the_standby_has_replayed_that(pool, owner, follower, create_tenant):
    tenant_id = await create_tenant()
    await end_grace(owner, tenant_id)
    await _caught_up(follower, owner)
    async with _held_back(follower, owner):
        await erasures.begin(pool, tenant_id, "tester")
        assert await _name(pool, tenant_id, read_only=True) == "A"
        with pytest.raises(NotFoundError, match="was erased"):
            await _name(pool, tenant_id, read_only=False)
    with pytest.raises(NotFoundError, match="was erased"):
        await _name(pool, tenant_id, read_only=True)


async def test_a_standby_that_is_gone_is_unavailable_and_nothing_reads_elsewhere(
    pool, owner, follower, create_tenant, reading_settings, standby
):
    tenant_id = await create_tenant()
    verdicts = NoisyNeighborDetection(pool, TenantDirectory(reading_settings))
    await _caught_up(follower, owner)
    assert await verdicts.verdicts_of(tenant_id) == []
    standby.kill()
    for _ in range(2):  # on the connection that was lost, then on none
        with pytest.raises(UnavailableError):
            await _name(pool, tenant_id, read_only=True)
        with pytest.raises(UnavailableError):
            await verdicts.verdicts_of(tenant_id)
    await _rename(pool, tenant_id, "B")
    assert await _name(pool, tenant_id, read_only=False) == "B"
    with pytest.raises(UnavailableError):
        await TenantConnectionPool.open(reading_settings)
    standby.start()
    standby.wait_ready()
    async with owner_of(reading_settings.model_copy(update={"db_host": HOST})) as again:
        await _caught_up(again, owner)
    assert await _name(pool, tenant_id, read_only=True) == "B"


async def test_a_standby_that_hangs_costs_a_bounded_wait(
    reading_settings, owner, follower, create_tenant, standby, monkeypatch
):
    monkeypatch.setattr(pools, "_STATEMENT_S_MAX", 1.0)
    tenant_id = await create_tenant()
    await _caught_up(follower, owner)
    pool = await TenantConnectionPool.open(reading_settings.model_copy(update={"db_pool_wait_ms": 5_000}))
    assert await _name(pool, tenant_id, read_only=True) == "A"
    postmaster = standby.process.ref.find()
    hanging = [postmaster, *postmaster.children(recursive=True)]
    for process in hanging:
        process.suspend()
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    await _name(pool, tenant_id, read_only=True)
            assert await _name(pool, tenant_id, read_only=False) == "A"
            await pool.close()
    finally:
        for process in hanging:
            process.resume()
