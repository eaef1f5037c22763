"""The pool: one tenant per transaction, no context left over, no privileged login, no endless wait."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId

pytestmark = pytest.mark.services

BACKEND = "SELECT pg_backend_pid()"


@pytest.fixture
async def single(database_settings):
    """A pool of one connection, so that the next check-out meets what the last one left."""
    pool = await TenantConnectionPool.open(
        # The wait covers connecting anew, and some of these tests break a connection.
        database_settings.model_copy(update={"db_pool_size": 1, "db_pool_wait_ms": 60_000})
    )
    yield pool
    await pool.close()


async def test_the_context_is_the_tenants_and_ends_with_the_transaction(single, create_tenant):
    first, second = await create_tenant(), await create_tenant()
    async with single.tenant(first) as tx:
        assert await TenantContext.read(tx) == first
        backend = await tx.fetchval(BACKEND)
    async with single.tenant(second) as tx:
        assert await TenantContext.read(tx) == second
        assert await tx.fetchval(BACKEND) == backend
    async with single.platform() as tx:
        assert await TenantContext.read(tx) == PLATFORM


@pytest.mark.parametrize(
    "leave", ["SET app.tenant_id = '{}'", "SELECT set_config('app.tenant_id', '{}', false)"], ids=["SET", "set_config"]
)
async def test_a_connection_that_kept_a_context_is_closed(single, create_tenant, leave):
    tenant_id = await create_tenant()
    async with single.tenant(tenant_id) as tx:
        await tx.execute(leave.format(tenant_id))
        backend = await tx.fetchval(BACKEND)
    for _ in range(2):
        async with single.platform() as tx:
            assert await tx.fetchval(BACKEND) != backend
            await tx.execute("SELECT set_config('app.tenant_id', '', true)")
            assert await tx.fetchval("SELECT count(*) FROM tenants") == 0


@pytest.mark.parametrize("leave", ["SET search_path = pg_catalog", "SET ROLE settler_relay"])
async def test_other_session_state_does_not_reach_the_next_tenant(single, create_tenant, leave):
    tenant_id = await create_tenant()
    async with single.tenant(tenant_id) as tx:
        await tx.execute(leave)
    async with single.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT current_user") == "settler_app"
        assert await tx.fetchval("SELECT count(*) FROM tenants") == 1


async def test_an_exception_rolls_back_and_the_connection_is_clean(single, create_tenant):
    tenant_id = await create_tenant()
    with pytest.raises(KeyError):
        async with single.tenant(tenant_id) as tx:
            await tx.execute("UPDATE tenants SET name = 'changed'")
            raise KeyError
    async with single.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT name FROM tenants") == "A"


async def test_a_savepoint_keeps_the_context(single, create_tenant):
    tenant_id = await create_tenant()
    async with single.tenant(tenant_id) as tx:
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with tx.transaction():
                await tx.execute("SELECT 1 / 0")
        assert await tx.fetchval("SELECT id::text FROM tenants") == tenant_id


async def test_a_cancelled_query_leaves_no_context(single, create_tenant, owner):
    tenant_id = await create_tenant()
    started = asyncio.Event()

    async def long_query():
        async with single.tenant(tenant_id) as tx:
            started.set()
            await tx.execute("SELECT pg_sleep(60)")

    task = asyncio.create_task(long_query())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with single.platform() as tx:
        assert await TenantContext.read(tx) == PLATFORM


async def test_a_killed_backend_is_unavailable_and_replaced(single, create_tenant, owner):
    tenant_id = await create_tenant()
    with pytest.raises(UnavailableError):
        async with single.tenant(tenant_id) as tx:
            await owner.execute("SELECT pg_terminate_backend($1, 60000)", await tx.fetchval(BACKEND))
            await tx.fetchval("SELECT 1")
    async with single.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT 1") == 1


async def test_a_backend_killed_before_the_commit_is_unavailable(single, create_tenant, owner):
    tenant_id = await create_tenant()
    with pytest.raises(UnavailableError):
        async with single.tenant(tenant_id) as tx:
            await owner.execute("SELECT pg_terminate_backend($1, 60000)", await tx.fetchval(BACKEND))
    async with single.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT 1") == 1


async def test_a_transaction_that_pauses_is_ended_by_the_server(single, create_tenant):
    tenant_id = await create_tenant()
    ended = asyncio.Event()

    async def pause():
        async with single.tenant(tenant_id) as tx:
            assert await tx.fetchval("SHOW idle_in_transaction_session_timeout") == "20s"
            assert await tx.fetchval("SHOW lock_timeout") == "10s"
            await tx.execute("SET LOCAL idle_in_transaction_session_timeout = '20ms'")
            tx.add_termination_listener(lambda _: ended.set())
            await asyncio.wait_for(ended.wait(), 15)

    with pytest.raises(UnavailableError):
        await pause()
    assert ended.is_set()


CLOSE_PORTAL = b"C" + (6).to_bytes(4) + b"P\0"
"""A message of the extended protocol, after which the server waits for the Sync that ends the exchange."""


async def test_a_client_that_goes_in_the_middle_of_an_exchange_keeps_no_lock(
    single, database_settings, create_tenant, owner
):
    """To the server it is not idle, as it was in the midst of saying something: only the transaction's time ends it."""
    async with single.platform() as tx:
        assert await tx.fetchval("SHOW transaction_timeout") == "1min"
    tenant_id = await create_tenant()
    # Its limits hold from its last statement on: whatever comes before may take its time.
    client = await asyncpg.connect(database_settings.postgres_url(), server_settings={"transaction_timeout": "0"})
    ended = asyncio.Event()
    client.add_termination_listener(lambda _: ended.set())
    await client.execute("BEGIN")
    await TenantContext.set(client, tenant_id)
    await client.execute("UPDATE tenants SET name = 'B' WHERE id = $1", tenant_id)
    await client.execute(
        "SET LOCAL idle_in_transaction_session_timeout = '50ms'; SET LOCAL transaction_timeout = '500ms'"
    )
    client._transport.write(CLOSE_PORTAL)
    name = await asyncio.wait_for(owner.fetchval("SELECT name FROM tenants WHERE id = $1 FOR UPDATE", tenant_id), 60)
    assert name == "A"
    await asyncio.wait_for(ended.wait(), 60)


async def test_closing_does_not_wait_for_ever(database_settings, create_tenant, monkeypatch):
    monkeypatch.setattr("settler_streams.adapters.postgres.pool._CLOSE_S_MAX", 0.05)
    pool = await TenantConnectionPool.open(database_settings)

    async def keep_open():
        async with pool.tenant(await create_tenant()) as tx:
            await pool.close()
            await tx.fetchval("SELECT 1")

    with pytest.raises(UnavailableError):
        await keep_open()


async def test_the_wait_for_a_connection_is_bounded(single, create_tenant, monkeypatch):
    tenant_id = await create_tenant()
    async with single.tenant(tenant_id):
        monkeypatch.setattr(single, "_wait_ms_max", 200)
        with pytest.raises(UnavailableError, match="within 200 ms"):
            async with single.tenant(tenant_id):
                pass


async def test_the_wait_is_observable(database_settings, create_tenant):
    waits: list[float] = []
    pool = await TenantConnectionPool.open(database_settings, on_wait=waits.append)
    async with pool.tenant(await create_tenant()):
        assert len(waits) == 1
        assert 0 <= waits[0] < database_settings.db_pool_wait_ms / 1000
    await pool.close()


async def test_a_tenant_id_that_is_not_canonical_is_refused(pool):
    for text in ("", "' OR true", PLATFORM.replace("-", ""), "ABCDEF00-0000-4000-8000-000000000000"):
        with pytest.raises(ValueError, match=r"canonical|badly formed"):
            async with pool.tenant(TenantId(text)):
                pass


async def test_read_only_refuses_writes(pool, create_tenant):
    tenant_id = await create_tenant()
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        async with pool.tenant(tenant_id, read_only=True) as tx:
            await tx.execute("UPDATE tenants SET name = 'B'")


async def test_reads_go_to_the_read_host(database_settings, create_tenant):
    # The same server under another name stands for the replica: the server sees which address was asked for.
    pool = await TenantConnectionPool.open(database_settings.model_copy(update={"db_read_host": "localhost"}))
    tenant_id = await create_tenant()
    async with pool.tenant(tenant_id, read_only=True) as reading, pool.tenant(tenant_id) as writing:
        assert await reading.fetchval("SELECT id::text FROM tenants") == tenant_id
        assert reading._con._addr[0] == "localhost"
        assert writing._con._addr[0] == "127.0.0.1"
    await pool.close()


async def test_without_a_statement_cache_nothing_is_prepared_for_later(database_settings, create_tenant):
    pool = await TenantConnectionPool.open(database_settings.model_copy(update={"db_statement_cache_size": 0}))
    async with pool.tenant(await create_tenant()) as tx:
        await tx.fetch("SELECT id FROM tenants WHERE name = $1", "A")
        assert await tx.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
    await pool.close()


async def test_a_superuser_login_is_refused(database_settings):
    owner_login = {"db_app_user": database_settings.db_user, "db_app_password": database_settings.db_password}
    with pytest.raises(ConfigurationError, match="is a superuser"):
        await TenantConnectionPool.open(database_settings.model_copy(update=owner_login))


@pytest.mark.parametrize(
    ("arrange", "restore", "reason"),
    [
        ("ALTER ROLE settler_app BYPASSRLS", "ALTER ROLE settler_app NOBYPASSRLS", "may bypass"),
        (
            "CREATE TABLE owned (); ALTER TABLE owned OWNER TO settler_app",
            "DROP TABLE owned",
            "owns tables",
        ),
        (
            "CREATE ROLE above BYPASSRLS; GRANT above TO settler_app WITH INHERIT FALSE, SET TRUE",
            "DROP ROLE above",
            "may bypass",
        ),
        ("CREATE ROLE above SUPERUSER; GRANT above TO settler_app", "DROP ROLE above", "is a superuser"),
    ],
    ids=["bypassrls", "owner", "member-of-bypassrls", "member-of-superuser"],
)
async def test_a_login_that_could_escape_is_refused(database_settings, owner, arrange, restore, reason):
    await owner.execute(arrange)
    try:
        with pytest.raises(ConfigurationError, match=reason):
            await TenantConnectionPool.open(database_settings)
    finally:
        await owner.execute(restore)


OWN_ROWS = "tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::uuid"


@pytest.mark.parametrize(
    ("arrange", "restore"),
    [
        ("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY", "ALTER TABLE jobs ENABLE ROW LEVEL SECURITY"),
        ("ALTER TABLE jobs NO FORCE ROW LEVEL SECURITY", "ALTER TABLE jobs FORCE ROW LEVEL SECURITY"),
        (
            "ALTER POLICY tenant_rows_only ON jobs RENAME TO parted; ALTER POLICY parted ON jobs TO settler_relay",
            "ALTER POLICY parted ON jobs TO PUBLIC; ALTER POLICY parted ON jobs RENAME TO tenant_rows_only",
        ),
        (
            "ALTER POLICY tenant_rows_only ON jobs USING (true)",
            f"ALTER POLICY tenant_rows_only ON jobs USING ({OWN_ROWS})",
        ),
    ],
    ids=["switched-off", "not-forced", "policy-of-one-role", "policy-widened"],
)
async def test_a_database_that_no_longer_keeps_tenants_apart_is_refused(database_settings, owner, arrange, restore):
    await owner.execute(arrange)
    try:
        with pytest.raises(ConfigurationError, match=r"does not keep its tenants apart: .*: jobs"):
            await TenantConnectionPool.open(database_settings)
    finally:
        await owner.execute(restore)
    await (await TenantConnectionPool.open(database_settings)).close()


async def test_a_wrong_password_or_database_is_a_wrong_setting(database_settings):
    for wrong in ({"db_app_password": database_settings.db_password}, {"db_name": "nowhere"}):
        with pytest.raises(ConfigurationError, match="refuses the login"):
            await TenantConnectionPool.open(database_settings.model_copy(update=wrong))


async def test_an_unreachable_server_is_unavailable(database_settings):
    with pytest.raises(UnavailableError):
        await TenantConnectionPool.open(database_settings.model_copy(update={"db_port": 1}))
