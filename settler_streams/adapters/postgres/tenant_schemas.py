"""Schemas of single tenants: moving a tenant in or out, comparing layouts, and bringing all schemas to a new one.

Run by the owner of the database. Each schema is changed in one transaction of its own, so whatever is killed half-way
leaves each tenant either where it was or where it should be; repeating the call does what is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

import asyncpg
import structlog

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.failures import translated
from settler_streams.adapters.postgres.migration_files import TENANT_SCOPE, Migration
from settler_streams.adapters.postgres.roles import execute_formatted
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import ConfigurationError, NotFoundError, UnavailableError
from settler_streams.ids import TenantId, canonical_tenant

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction
    from settler_streams.adapters.postgres.roles import Connection
    from settler_streams.settings import Settings

SHARED = "public"
PAGE = 100
"""Names of schemas in memory at a time, however many there are."""
MOVE_LOCK_WAIT = "30s"
"""Transactions of the tenant that are under way end within seconds; a move that waits longer gives up, and may be
repeated. Those that begin meanwhile wait for it."""

IDLE_MAX = "20s"
"""Whoever moves a tenant or migrates holds locks that others wait for: one that stands still inside its transaction is
ended, as services are. Nothing is done there but statements, so the longest honest pause is a busy machine's."""

_CONNECT_S_MAX = 10.0
# A machine that vanishes says nothing, and its locks would stay for hours. Half a minute without an answer is its end,
# whether the server waits for it or has something to tell it; also of a reader that has taken nothing for so long.
_NETWORK_LIMITS = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
_log = structlog.get_logger(__name__)
_SCHEMA_NAME_PREFIX = "t_"

Progress = Callable[[int, int], None]
"""Told how many schemas are done, and of how many."""
Note = Callable[["Transaction", int], Awaitable[None]]
"""Given the transaction of a move, in the tenant's context, and how many rows it has moved."""


async def move(settings: Settings, tenant_id: TenantId, *, own_schema: bool, note: Note | None = None) -> int:
    """Put a tenant's rows into a schema of its own, or back among all others'; returns how many rows moved.

    Everything or nothing. The tenant's transactions wait meanwhile; it takes about as long as writing the rows again.
    ``note`` may write down, in the same transaction and in the tenant's new place, that it was moved.

    Raises:
        ConfigurationError: the tenant's schema is not at the layout of the shared one; migrate first.
        NotFoundError: there is no such tenant, or it was erased.
        UnavailableError: the server failed, the database is being migrated, transactions of the tenant did not end in
            time, or this process stood still for so long that the server ended it.
    """
    async with (
        owner_connection(settings, idle_in_transaction_session_timeout=IDLE_MAX) as connection,
        connection.transaction(),
    ):
        # A migration reads the schemas' names a page at a time: none of them may go meanwhile.
        if not await connection.fetchval(queries.KEEP_MIGRATIONS_OUT):
            raise UnavailableError("the database is being migrated")
        await execute_formatted(connection, queries.LIMIT_LOCK_WAIT_TO, MOVE_LOCK_WAIT)
        await connection.execute(queries.LOCK_TENANT_SCHEMA, tenant_id)
        await TenantContext.set(connection, tenant_id)
        if not await connection.fetchval(queries.TENANT_EXISTS, tenant_id):
            raise NotFoundError(f"no tenant {tenant_id}")
        schema = await connection.fetchval(queries.SCHEMA_OF, tenant_id)
        if own_schema == (schema is not None):
            return 0
        if own_schema:
            await connection.execute(queries.CREATE_TENANT_SCHEMA)
            schema = await connection.fetchval(queries.SCHEMA_OF, tenant_id)
            moved = int(await connection.fetchval(queries.MOVE_TENANT_ROWS, SHARED, schema))
        else:
            await _refuse_differences(connection, schema)
            moved = int(await connection.fetchval(queries.MOVE_TENANT_ROWS, schema, SHARED))
            await connection.execute(queries.FORGET_SCHEMA, tenant_id)
            await execute_formatted(connection, queries.DROP_SCHEMA, schema)
        if note is not None:
            await TenantContext.set(connection, tenant_id)  # whose tables lie elsewhere from now on
            await note(cast("Transaction", connection), moved)
        return moved


async def differences(connection: Connection, schema: str) -> list[str]:
    """In what the schema differs from the shared one, as statements or by name; empty when in nothing.

    Compared are its tables and views with all that protects them. Looked for is who else owns or may use it, and what
    else stands in it: a function there would be found in front of the shared one of that name.
    """
    found = [*await connection.fetch(queries.LAYOUT_DIFFERENCES, schema)]
    found += await connection.fetch(queries.SCHEMA_ADDITIONS, schema)
    return [row[0] for row in found]


async def schemas(connection: Connection) -> AsyncIterator[str]:
    """The names of all tenants' schemas, in order, a page at a time."""
    last = ""
    while page := await connection.fetch(queries.SCHEMAS_AFTER, last, PAGE):
        for row in page:
            yield row[0]
        last = page[-1][0]


async def migrate_schemas(
    connection: Connection, files: Sequence[Migration], progress: Progress = lambda _done, _all: None
) -> int:
    """Bring every tenant's schema to the layout of the shared one; returns how many were changed.

    Raises:
        ConfigurationError: a schema's layout differs afterwards; it stays as it was, and so do those behind it.
    """
    total, done, changed = int(await connection.fetchval(queries.SCHEMAS_COUNT)), 0, 0
    async for schema in schemas(connection):
        async with connection.transaction():
            changed += await _migrate_schema(connection, schema, files)
        done += 1
        progress(done, max(total, done))
    return changed


async def enter(connection: Connection, schema: str) -> int | None:
    """Set the context of the schema's tenant, also of one that is being erased; returns the schema's layout.

    Until the erasure has ended, the schema needs what its policies call: it follows migrations as all others do.

    Returns:
        None: the schema is gone, with its tenant.

    Raises:
        ConfigurationError: it belongs to no tenant that is known to have one.
    """
    tenant_id = tenant_of(schema)
    try:
        async with connection.transaction():
            await TenantContext.set(connection, tenant_id)
    except NotFoundError:
        await connection.fetchval(queries.ENTER_ERASURE, tenant_id)
    layout: int | None = await connection.fetchval(queries.LAYOUT_OF, tenant_id)
    if layout is None:
        if await connection.fetchval(queries.SCHEMA_IS_THERE, tenant_id):
            raise ConfigurationError(f"schema {schema!r} belongs to no tenant that is known to have one")
        _log.info("schema is gone with its tenant", schema=schema)
    return layout


async def _migrate_schema(connection: Connection, schema: str, files: Sequence[Migration]) -> bool:
    layout = await enter(connection, schema)
    if layout is None or layout == files[-1].version:
        return False
    for migration in files:
        if migration.version > layout and migration.sql.startswith(TENANT_SCOPE):
            await connection.execute(migration.sql)
    await connection.execute(queries.RECORD_LAYOUT, tenant_of(schema), files[-1].version)
    await _refuse_differences(connection, schema)
    return True


async def _refuse_differences(connection: Connection, schema: str) -> None:
    if found := await differences(connection, schema):
        raise ConfigurationError(f"the layout of schema {schema!r} differs from the shared one: " + "; ".join(found))


def tenant_of(schema: str) -> TenantId:
    """Whose schema it is, by its name."""
    digits = schema.removeprefix(_SCHEMA_NAME_PREFIX)
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return canonical_tenant("-".join(parts))


@contextlib.asynccontextmanager
async def owner_connection(settings: Settings, database: str | None = None, **limits: str) -> AsyncIterator[Connection]:
    """A connection of the database's owner, to ``database`` if it is another one; ``limits`` are set for the session.

    Raises:
        UnavailableError: the server cannot be reached, fails meanwhile, or ended the session.
    """
    with translated():
        connection = await asyncpg.connect(
            host=settings.db_host,
            port=settings.db_port,
            database=database or settings.db_name,
            user=settings.db_user,
            password=settings.db_password.get_secret_value(),
            timeout=_CONNECT_S_MAX,
            server_settings=_NETWORK_LIMITS | limits,
        )
        try:
            yield connection
        except asyncpg.InterfaceError as error:
            if connection.is_closed():
                raise UnavailableError(f"the connection to PostgreSQL was lost: {error}") from error
            raise
        finally:
            await connection.close()
