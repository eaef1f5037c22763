"""Databases that are equal for tenant A and differ in everything else, and what A is told by each of them."""

from __future__ import annotations

import contextlib
import uuid
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.ids import PLATFORM, TenantId
from tests.adapters.postgres.conftest import owner_of
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.isolation.probe import A, B

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from settler_streams.settings import Settings

MARK = "zq"
"""Stands in every text of B and in none of A's: where A reads it, it has leaked."""

ROWS_OF_A = 4
ROWS_OF_B = {"nothing": 0, "little": 2, "much": 60}
"""Name of the database to the rows of B in each of its tables."""

# Runs statements one by one, undoes each, and says what each said: its rows in any order, or its SQLSTATE, message,
# detail and hint. One call for many: a round trip for each would be most of the time.
_RUNNER = """
CREATE FUNCTION run(statements text[]) RETURNS text[] LANGUAGE plpgsql AS $$
DECLARE
    statement text;
    found record;
    lines text[];
    affected bigint;
    said text;
    detail text;
    hint text;
    answers text[] := '{}';
BEGIN
    FOREACH statement IN ARRAY statements LOOP
        BEGIN
            lines := '{}';
            IF statement ~ '^(SELECT|WITH|EXPLAIN|TABLE)|RETURNING' THEN
                FOR found IN EXECUTE statement LOOP lines := lines || found::text; END LOOP;
                IF statement !~ '^EXPLAIN' THEN
                    SELECT coalesce(array_agg(line ORDER BY line), '{}') INTO lines FROM unnest(lines) AS line;
                END IF;
                said := array_to_string(lines, E'\\n');
            ELSE
                EXECUTE statement;
                GET DIAGNOSTICS affected = ROW_COUNT;
                said := affected || ' rows';
            END IF;
            RAISE SQLSTATE 'UNDO0';
        EXCEPTION
            WHEN SQLSTATE 'UNDO0' THEN NULL;
            WHEN OTHERS THEN
                GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
                said := concat_ws(' | ', 'ERROR', SQLSTATE, SQLERRM, detail, hint);
        END;
        answers := answers || said;
    END LOOP;
    RETURN answers;
END $$;
GRANT EXECUTE ON FUNCTION run(text[]) TO settler_services
"""


def row_id_of(tenant_id: str, number: int) -> str:
    """The id of a tenant's row of that number, in every table."""
    return str(uuid.uuid5(uuid.UUID(tenant_id), str(number)))


async def make_twins(settings: Settings) -> dict[str, Settings]:
    twins = {name: settings.model_copy(update={"db_name": f"twin_{name}_{uuid.uuid4().hex[:8]}"}) for name in ROWS_OF_B}
    for name, twin in twins.items():
        await migrate(twin)
        async with owner_of(twin) as owner:
            await owner.execute(_RUNNER)
            await _fill(owner, A, ROWS_OF_A, "a")
            await owner.execute(
                "INSERT INTO feature_flags (tenant_id, flag, scope, enabled, changed_by, changed_at, source_version)"
                f" VALUES ('{PLATFORM}', 'all', 'global', true, 'p', 'epoch', 0)"
            )
            if ROWS_OF_B[name]:
                await _fill(owner, B, ROWS_OF_B[name], f"{MARK}{name}")
            for tenant in range(ROWS_OF_B[name]):
                await _fill(owner, str(uuid.uuid4()), tenant % 2, f"{MARK}{tenant}")
            await _forget_the_time(owner)
            await owner.execute("ANALYZE")
    return twins


@contextlib.asynccontextmanager
async def weakened(twins: Mapping[str, Settings], sql: str) -> AsyncIterator[dict[str, Settings]]:
    """Copies of ``twins``, to which nobody may be connected, after ``sql`` of their owner; dropped afterwards."""
    copies = {name: twin.model_copy(update={"db_name": f"{twin.db_name}_weakened"}) for name, twin in twins.items()}
    async with owner_of(next(iter(twins.values())).model_copy(update={"db_name": "postgres"})) as server:
        try:
            for name, twin in twins.items():
                await server.execute(f"CREATE DATABASE {copies[name].db_name} TEMPLATE {twin.db_name}")
                async with owner_of(copies[name]) as owner:
                    await owner.execute(sql)
            yield copies
        finally:
            for copy in copies.values():
                await server.execute(f"DROP DATABASE IF EXISTS {copy.db_name} WITH (FORCE)")


async def _fill(owner: asyncpg.Connection, tenant_id: str, rows: int, mark: str) -> None:
    """Equal rows for equal arguments."""
    await owner.execute(
        "INSERT INTO tenants (id, root_id, slug, name, tier, created_at, updated_at)"
        " VALUES ($1, $1, $2, $2, 'free', 'epoch', 'epoch')", tenant_id, f"{mark}-1"
    )  # fmt: skip
    for number in range(rows):
        row_id = row_id_of(tenant_id, number)
        texts = {"'a@b'": f"'{mark}{number}@b'", "sha256('k')": f"sha256('{mark}{number}')", "now()": "'epoch'",
                 "'a.example'": f"'{mark}{number}.example'", "'e'": f"'{mark}'", "'l'": f"'{number}'",
                 "'d'": f"'{mark}'", "'a', 'b', 'c'": f"'{mark}', '{number}', 'c'"}  # fmt: skip
        for statement in ROWS.values():
            for old, new in texts.items():
                statement = statement.replace(old, new)  # noqa: PLW2901
            await owner.execute(statement, tenant_id, row_id)
        await owner.execute(
            "UPDATE jobs SET accepted_attempt = 1, outcome = 'succeeded', result_version = $3"
            " WHERE (tenant_id, job_id) = ($1, $2)",
            tenant_id, row_id, number,
        )  # fmt: skip


async def _forget_the_time(owner: asyncpg.Connection) -> None:
    """What the clock has written becomes the epoch."""
    for table, column in await owner.fetch(
        "SELECT attrelid::regclass::text, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attname = 'created_at'"
        " AND relname NOT IN ('schema_migrations')"
    ):
        await owner.execute(f"UPDATE {table} SET {column} = 'epoch'")
    await owner.execute("UPDATE users SET updated_at = 'epoch'; UPDATE webhooks SET updated_at = 'epoch'")
    await owner.execute("UPDATE webhook_lanes SET due_at = 'infinity'")  # an age would tell the time


@contextlib.asynccontextmanager
async def session(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """The services' login, in a transaction in A's context that is rolled back."""
    connection = await asyncpg.connect(
        host=settings.db_host, port=settings.db_port, database=settings.db_name, user=settings.db_app_user,
        password=settings.db_app_password.get_secret_value(), statement_cache_size=0,
    )  # fmt: skip
    try:
        await connection.execute("BEGIN; SET LOCAL transaction_timeout = 0")
        await TenantContext.set(connection, TenantId(A))
        yield connection
    finally:
        await connection.close()


async def answers(connection: asyncpg.Connection, statements: Sequence[str]) -> list[str]:
    """What each statement says, in a line of text."""
    return await connection.fetchval("SELECT run($1)", list(statements))


async def with_and_without_others(settings: Settings, statements: Sequence[str]) -> tuple[list[str], list[str]]:
    """What A is told with everybody's rows there, and after all but its own and the platform's are gone.

    Both in one transaction: a table is as large as before, and so the planner plans alike.
    """
    async with owner_of(settings) as owner:
        transaction = owner.transaction()
        await transaction.start()
        try:
            heard = await _as_a(owner, settings, statements)
            await owner.execute("SET LOCAL session_replication_role = replica")  # no foreign key minds the order
            for table, column in await owner.fetch(
                "SELECT c.oid::regclass::text, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid"
                " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND NOT a.attisdropped"
                " AND a.attname = CASE c.relname WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END"
            ):
                await owner.execute(f"DELETE FROM {table} WHERE {column} NOT IN ('{A}', '{PLATFORM}')")
            await owner.execute("SET LOCAL session_replication_role = origin")
            return heard, await _as_a(owner, settings, statements)
        finally:
            await transaction.rollback()


async def _as_a(owner: asyncpg.Connection, settings: Settings, statements: Sequence[str]) -> list[str]:
    await TenantContext.set(owner, TenantId(A))  # first: it gives the session back its own role
    await owner.execute(f"SET LOCAL ROLE {settings.db_app_user}; SET LOCAL transaction_timeout = 0")
    try:
        return await answers(owner, statements)
    finally:
        await owner.execute("RESET ROLE")


async def said(connection: asyncpg.Connection, statement: str, *arguments: object) -> str:
    """As ``answers``, for one statement with parameters, sent as the services send it."""
    await connection.execute("SAVEPOINT said")
    try:
        return repr(sorted(map(repr, await connection.fetch(statement, *arguments))))
    except asyncpg.PostgresError as error:
        return " | ".join(map(str, ("ERROR", error.sqlstate, error, error.detail, error.hint)))
    finally:
        await connection.execute("ROLLBACK TO said")
