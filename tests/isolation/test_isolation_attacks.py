"""What somebody tries who can run any SQL in a tenant's transaction, or who is lucky with a pooled connection."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import asyncpg
import pytest

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.isolation.probe import ROW_ID, A, B

pytestmark = pytest.mark.services

READABLE = [*ROWS, "tenants", "accepted_matches", "accepted_unmatched", "accepted_reports"]
_WAIT_S_MAX = 60


@pytest.fixture(scope="module", autouse=True)
async def world(database_settings):
    """B has a row in every table; A is a tenant and has none."""
    pool = await TenantConnectionPool.open(database_settings)
    for tenant_id, slug in ((A, "a"), (B, "b")):
        async with pool.tenant(TenantId(tenant_id)) as tx:
            await tx.execute(
                "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, $2, 'free')", tenant_id, slug
            )
            if tenant_id == B:
                for statement in ROWS.values():
                    await tx.execute(statement, B, ROW_ID)
                await tx.execute("UPDATE jobs SET accepted_attempt = 1, outcome = 'succeeded', result_version = 0")
    await pool.close()


@pytest.fixture
async def single(database_settings):
    """A pool of one connection: whatever is left over meets the next one who asks."""
    pool = await TenantConnectionPool.open(database_settings.model_copy(update={"db_pool_size": 1}))
    yield pool
    await pool.close()


@contextlib.asynccontextmanager
async def login(settings, **server_settings):
    """A session of the services' login, outside the pool."""
    connection = await asyncpg.connect(
        host=settings.db_host,
        port=settings.db_port,
        database=settings.db_name,
        user=settings.db_app_user,
        password=settings.db_app_password.get_secret_value(),
        server_settings=server_settings,
    )
    try:
        yield connection
    finally:
        await connection.close()


async def seen(connection) -> set[str]:
    """The tables and views in which a row can be seen."""
    return {table for table in READABLE if await connection.fetchval(f"SELECT count(*) FROM {table}")}


EVERYTHING = set(READABLE)


async def test_there_is_something_to_steal(single):
    async with single.tenant(TenantId(B)) as tx:
        assert await seen(tx) == EVERYTHING


@pytest.mark.parametrize(
    "statement",
    [
        # Another role.
        "SET ROLE postgres", "SET LOCAL ROLE settler_services", "SET SESSION AUTHORIZATION postgres",
        "SET ROLE pg_read_all_data", "ALTER ROLE settler_app SUPERUSER", "CREATE ROLE another",
        "GRANT settler_relay TO settler_app WITH INHERIT TRUE",
        # Names that shadow tables, functions and operators.
        "CREATE TEMP TABLE jobs (tenant_id uuid)", "CREATE TEMP VIEW jobs AS SELECT 1",
        "CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql RETURN 'x'",
        "CREATE FUNCTION public.current_setting(text, boolean) RETURNS text LANGUAGE sql RETURN 'x'",
        "CREATE TABLE public.jobs2 ()", "CREATE SCHEMA mine", "CREATE SEQUENCE mine", "CREATE EXTENSION dblink",
        # Rules of the house.
        "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY", "DROP POLICY tenant_rows_only ON jobs",
        "CREATE POLICY mine ON jobs USING (true)", "ALTER VIEW accepted_matches SET (security_invoker = false)",
        "SET session_replication_role = replica",
        "SET lo_compat_privileges = on", "CREATE PUBLICATION mine FOR TABLE jobs",
        "CREATE TRIGGER mine AFTER INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION register_slug()",
        "TRUNCATE jobs", "ANALYZE VERBOSE pg_authid; SELECT * FROM pg_authid", "SELECT * FROM pg_statistic",
        "SELECT * FROM pg_statistic_ext_data", "SELECT * FROM pg_user_mapping", "SELECT * FROM pg_largeobject",
        # Files, programs, other servers.
        "COPY (SELECT 1) TO PROGRAM 'id'", "COPY jobs FROM PROGRAM 'id'", "COPY jobs TO '/tmp/jobs'",
        "SELECT pg_read_file('postgresql.conf')", "SELECT pg_read_binary_file('PG_VERSION')", "SELECT pg_ls_dir('.')",
        "SELECT pg_stat_file('PG_VERSION')", "SELECT lo_import('/etc/passwd')", "SELECT lo_export(1, '/tmp/x')",
        "SELECT pg_ls_waldir()", "SELECT pg_logical_emit_message(true, 'a', 'b') FROM pg_authid",
        # What tells how much others do.
        "SELECT nextval('outbox_id_seq')", "SELECT last_value FROM outbox_id_seq",
        "INSERT INTO outbox (tenant_id, topic, key, event) VALUES ('AAA', 't', 'k', '') RETURNING id",
        "INSERT INTO outbox (tenant_id, topic, key, event) VALUES ('AAA', 't', 'k', ''); SELECT lastval()",
        "SELECT * FROM tenant_slugs", "SELECT * FROM outbox", "SELECT pg_stat_reset()",
        "SELECT pg_get_backend_memory_contexts()", "SELECT * FROM pg_hba_file_rules",
        # The same inside a block.
        "DO $$ BEGIN EXECUTE 'SET ROLE postgres'; END $$", "DO $$ BEGIN PERFORM count(*) FROM outbox; END $$",
        "CALL protect_tenant_table('jobs')", "SELECT register_slug()",
        "SET LOCAL row_security = off; SELECT * FROM jobs",
    ],
)  # fmt: skip
async def test_this_is_refused(single, statement):
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with single.tenant(TenantId(A)) as tx:
            await tx.execute(statement.replace("AAA", A))


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("COPY jobs FROM STDIN", asyncpg.FeatureNotSupportedError),
        ("PREPARE TRANSACTION 'mine'", asyncpg.ObjectNotInPrerequisiteStateError),
        ("SELECT register_slug()", asyncpg.PostgresError),
    ],
)
async def test_this_fails_for_everybody(database_settings, statement, error):
    async with login(database_settings) as connection:
        await connection.execute("BEGIN")
        await TenantContext.set(connection, TenantId(A))
        with pytest.raises(error):
            await connection.execute(statement)


async def test_the_server_is_not_the_services_to_configure(database_settings):
    async with login(database_settings) as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("ALTER SYSTEM SET log_statement = 'all'")


@pytest.mark.parametrize(
    "context",
    [None, "", "RESET", "DISCARD", "00000000-0000-0000-0000-000000000001", "6f0f3a54-6a39-4a1e-9d0e-0a4b7f3d2c11"],
)
async def test_without_a_context_of_its_own_nothing_is_seen(database_settings, context):
    async with login(database_settings) as connection, connection.transaction():
        if context == "RESET":
            await TenantContext.set(connection, TenantId(B))
            await connection.execute("RESET app.tenant_id")
        elif context == "DISCARD":
            await TenantContext.set(connection, TenantId(B))
            await connection.execute("RESET ALL")
        elif context is not None:
            await connection.execute(f"SET LOCAL app.tenant_id = '{context}'")
        assert await seen(connection) == set()


@pytest.mark.parametrize("context", ["x", "' OR true --", "*", "NULL", B[:-1], B + ",", B + A, "%", "\u202e" + B])
async def test_a_malformed_context_fails_and_shows_nothing(database_settings, context):
    async with login(database_settings) as connection:
        for table in READABLE:
            async with connection.transaction():
                await connection.fetchval("SELECT set_config('app.tenant_id', $1, true)", context)
                with pytest.raises(asyncpg.InvalidTextRepresentationError) as raised:
                    async with connection.transaction():
                        await connection.fetch(f"SELECT * FROM {table}")
                assert str(raised.value) == f'invalid input syntax for type uuid: "{context}"'


async def test_whoever_runs_any_sql_can_name_another_tenant(single):
    """The bad news: the policies trust the setting. Statements are constants with parameters for that reason."""
    async with single.tenant(TenantId(A)) as tx:
        await tx.fetchval("SELECT set_config('app.tenant_id', $1, true)", B)
        assert await seen(tx) == EVERYTHING


async def test_a_context_that_outlives_its_transaction_closes_the_connection(single):
    async with single.tenant(TenantId(B)) as tx:
        process = await tx.fetchval("SELECT pg_backend_pid()")
        await tx.execute(f"SET app.tenant_id = '{B}'")
    async with single.tenant(TenantId(A)) as tx:
        assert await tx.fetchval("SELECT pg_backend_pid()") != process
        assert await seen(tx) == {"tenants"}


async def test_nothing_else_is_left_over_on_a_pooled_connection(single):
    async with single.tenant(TenantId(B)) as tx:
        process = await tx.fetchval("SELECT pg_backend_pid()")
        await tx.execute(
            "DECLARE kept CURSOR WITH HOLD FOR SELECT * FROM jobs; PREPARE kept AS SELECT * FROM jobs;"
            "SET search_path = pg_temp; SET app.other = 'b'; LISTEN b; SELECT pg_advisory_lock(7)"
        )
    async with single.tenant(TenantId(A)) as tx:
        assert await tx.fetchval("SELECT pg_backend_pid()") == process
        assert await tx.fetchval("SELECT count(*) FROM pg_cursors WHERE is_holdable") == 0
        assert await tx.fetchval("SELECT current_setting('app.other', true)") in (None, "")
        assert await tx.fetchval("SHOW search_path") == "public, pg_temp"
        assert await tx.fetch("SELECT pg_listening_channels()") == []
        assert (
            await tx.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'")
            == 0
        )
        assert await tx.fetch("EXECUTE kept") == []


async def test_a_cancelled_query_leaves_no_context(single):
    async def count_for_long():
        async with single.tenant(TenantId(B)) as tx:
            tx.add_log_listener(tell)
            try:
                await tx.execute(
                    "DO $$BEGIN RAISE NOTICE 'begun'; PERFORM count(*) FROM generate_series(1, 10000000000); END$$"
                )
            finally:
                tx.remove_log_listener(tell)

    def tell(*_):
        """A request to cancel that is there before its query changes nothing; only the server knows when that is."""
        begun.set()

    begun = asyncio.Event()
    task = asyncio.create_task(count_for_long())
    await asyncio.wait_for(begun.wait(), _WAIT_S_MAX)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with single._transaction(single._primary, read_only=False) as bare:
        assert await seen(bare) == set()
    async with single.tenant(TenantId(A)) as tx:
        assert await seen(tx) == {"tenants"}


async def test_a_killed_backend_leaves_no_context(single, owner):
    with pytest.raises(UnavailableError):
        async with single.tenant(TenantId(B)) as tx:
            await owner.fetchval("SELECT pg_terminate_backend($1, 10000)", await tx.fetchval("SELECT pg_backend_pid()"))
            await tx.fetch("SELECT * FROM jobs")
    async with single.tenant(TenantId(A)) as tx:
        assert await seen(tx) == {"tenants"}


async def test_a_context_set_in_a_savepoint_goes_with_it(database_settings):
    async with login(database_settings) as connection:
        async with connection.transaction():
            await TenantContext.set(connection, TenantId(A))
            await connection.execute("SAVEPOINT one")
            await TenantContext.set(connection, TenantId(B))
            await connection.execute("SAVEPOINT two; ROLLBACK TO two")
            assert await seen(connection) == EVERYTHING
            await connection.execute("ROLLBACK TO one")
            assert await seen(connection) == {"tenants"}
            with pytest.raises(asyncpg.DivisionByZeroError):
                async with connection.transaction():
                    await TenantContext.set(connection, TenantId(B))
                    await connection.execute("SELECT 1 / 0")
            assert await seen(connection) == {"tenants"}
            async with connection.transaction():
                await TenantContext.set(connection, TenantId(B))
        assert await seen(connection) == set()


@pytest.mark.parametrize("mode", ["auto", "force_generic_plan", "force_custom_plan"])
async def test_a_prepared_statement_follows_the_context(database_settings, mode):
    async with login(database_settings, plan_cache_mode=mode) as connection:
        prepared = await connection.prepare("SELECT tenant_id::text FROM jobs WHERE coalesce(accepted_attempt, 1) = $1")
        for _ in range(8):  # the sixth execution is where a generic plan may take over
            for tenant_id, rows in ((A, []), (B, [B])):
                async with connection.transaction():
                    await TenantContext.set(connection, TenantId(tenant_id))
                    assert [row[0] for row in await prepared.fetch(1)] == rows
            assert await prepared.fetch(1) == []


async def test_a_prepared_statement_follows_the_role(database_settings):
    async with login(database_settings) as connection:
        async with connection.transaction():
            await TenantContext.set(connection, TenantId(B))
            await connection.execute("INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, 't', 'k', '')", B)
        async with connection.transaction():
            await connection.execute("SET LOCAL ROLE settler_relay")
            await connection.fetchval("SELECT set_config('app.tenant_id', $1, true)", str(uuid.UUID(int=0)))
            prepared = await connection.prepare("SELECT key FROM outbox")
            assert [row[0] for row in await prepared.fetch()] == ["k"]
        async with connection.transaction():
            await TenantContext.set(connection, TenantId(A))
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await prepared.fetch()


@pytest.mark.parametrize("role", ["settler_app", "settler_relay"])
async def test_the_relay_reads_nothing_in_a_tenants_context(database_settings, role):
    async with login(database_settings) as connection, connection.transaction():
        await TenantContext.set(connection, TenantId(A))
        await connection.execute(f"SET LOCAL ROLE {role}")
        for table in (*READABLE, "outbox"):
            with contextlib.suppress(asyncpg.InsufficientPrivilegeError):
                async with connection.transaction():
                    assert await connection.fetchval(f"SELECT count(*) FROM {table}") == (
                        1 if (table, role) == ("tenants", "settler_app") else 0
                    )


async def test_a_search_path_changes_nothing(single):
    async with single.tenant(TenantId(A)) as tx:
        for path in ("pg_temp, public", "public, pg_catalog, pg_temp"):
            await tx.execute(f"SET LOCAL search_path = {path}")
            assert await seen(tx) == {"tenants"}


@pytest.mark.parametrize(
    "expression",
    [
        "1 / (length(email) - 3)", "email::integer::text::bigint", "('{\"' || email)::jsonb::text::bigint",
        "(regexp_match(email, '('))[1]::bigint", "lpad(email, 2000000000)::bigint", "to_date(email, 'YYYY')::text::int",
    ],
)  # fmt: skip
async def test_no_function_is_shown_another_tenants_value(single, expression):
    """Each of these fails on B's row, and would say so if it saw it."""
    query = f"SELECT {expression} FROM users WHERE {expression} IS NOT NULL"
    with pytest.raises(asyncpg.PostgresError):
        async with single.tenant(TenantId(B)) as tx:
            await tx.fetch(query)
    async with single.tenant(TenantId(A)) as tx:
        assert await tx.fetch(query) == []


async def test_explain_names_rows_of_nobody_else(single):
    async with single.tenant(TenantId(A)) as tx:
        lines = [row[0] for row in await tx.fetch("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, BUFFERS OFF) TABLE users")]
    assert not any("Rows Removed" in line for line in lines)
    assert not any(B in line for line in lines)


async def test_statistics_of_values_are_hidden(single, owner):
    await owner.execute("ANALYZE users")
    assert await owner.fetchval("SELECT count(*) FROM pg_stats WHERE tablename = 'users'") > 0
    async with single.tenant(TenantId(A)) as tx:
        assert await tx.fetchval("SELECT count(*) FROM pg_stats WHERE schemaname = 'public'") == 0
        assert await tx.fetchval("SELECT last_value FROM pg_sequences WHERE sequencename = 'outbox_id_seq'") is None


async def test_another_session_is_seen_by_its_statement_and_not_by_its_values(database_settings, single):
    """All services share one login, which sees the text of all its sessions. The values are parameters."""
    async with login(database_settings) as connection, connection.transaction():
        await TenantContext.set(connection, TenantId(B))
        await connection.fetch("SELECT * FROM users WHERE tenant_id = $1 AND email = $2", B, "a@b")
        process = connection.get_server_pid()
        async with single.tenant(TenantId(A)) as tx:
            text = await tx.fetchval("SELECT query FROM pg_stat_activity WHERE pid = $1", process)
    assert text == "SELECT * FROM users WHERE tenant_id = $1 AND email = $2"


async def test_a_unique_value_that_another_tenant_is_writing_is_not_waited_for(database_settings, single):
    other = str(uuid.uuid4())
    insert = ROWS["users"]
    async with login(database_settings) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await TenantContext.set(connection, TenantId(B))
        await connection.execute(insert.replace("a@b", "new@b"), B, other)
        await connection.execute("SELECT * FROM users FOR UPDATE")
        async with single.tenant(TenantId(A)) as tx:
            await tx.execute("SET LOCAL lock_timeout = 1")
            await tx.execute(insert.replace("a@b", "new@b"), A, other)
            await tx.execute(insert, A, ROW_ID)
            assert await tx.fetchval("SELECT count(*) FROM (SELECT FROM users FOR UPDATE)") == 2
            await tx.execute("DELETE FROM users")
        await transaction.rollback()


async def test_writing_under_another_tenants_id_fails_alike_whether_it_exists(single):
    messages = set()
    for id_ in (B, str(uuid.uuid4())):
        with pytest.raises(asyncpg.InsufficientPrivilegeError) as raised:
            async with single.tenant(TenantId(A)) as tx:
                await tx.execute(
                    "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, 'b', 'b', 'free')", id_
                )
        messages.add((str(raised.value), raised.value.detail))
    assert messages == {('new row violates row-level security policy "tenant_rows_only" for table "tenants"', None)}


async def test_the_database_holds_no_large_object(owner):
    """They have no row-level security: whoever logs in as the services reads what the services wrote."""
    assert await owner.fetchval("SELECT count(*) FROM pg_largeobject_metadata") == 0
