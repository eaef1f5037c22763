"""Bring the database to the schema that the files under ``schemas/postgres/`` describe."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres import queries, roles
from settler_streams.adapters.postgres.failures import translated
from settler_streams.adapters.postgres.server_version import refuse_unsafe
from settler_streams.adapters.postgres.tenant_schemas import Progress, migrate_schemas
from settler_streams.errors import ConfigurationError
from settler_streams.published import MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from settler_streams.settings import Settings

SCHEMA = "public"

# Exists in every cluster; connected to while the database itself may be missing.
_MAINTENANCE_DATABASE = "postgres"

# Another process that migrates holds the lock for as long as its migrations take; an index over a large table is the
# longest of them.
_LOCK_WAIT = "600s"
_CONNECT_S_MAX = 10.0

_FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")


@dataclass(frozen=True)
class Migration:
    """One numbered file. The checksum is the SHA-256 of its bytes, in hexadecimal."""

    version: int
    name: str
    sql: str
    checksum: str


async def migrate(
    settings: Settings, *, directory: Path = MIGRATIONS, progress: Progress = lambda _done, _all: None
) -> list[str]:
    """Create what is missing (roles, database), then apply each new migration in a transaction of its own.

    Schemas of single tenants follow, each in a transaction of its own; ``progress`` is told of them.

    Run as often as wanted, by any number of processes at once: one works, the others wait and find nothing left to do.
    The owner connects directly, not through a transaction-mode pooler, because the lock belongs to its session.

    Returns:
        The names of the migrations that this call applied, in order.

    Raises:
        ConfigurationError: a file was changed, removed or numbered below one that is already applied; a file name is
            malformed or a number taken twice; the role names collide; the server has a known way around row-level
            security; a tenant's schema has another layout than the shared one.
        UnavailableError: the server cannot be reached, or another migration runs for longer than the lock wait.
    """
    roles.check_role_names(settings)
    files = read_migrations(directory)
    # Roles are shared by all databases of the cluster, and an advisory lock holds in one database only.
    async with _locked(settings, _MAINTENANCE_DATABASE) as maintenance:
        refuse_unsafe(await maintenance.fetchval(queries.SERVER_VERSION))
        await roles.create_roles(maintenance, settings)
        await roles.create_database(maintenance, settings)
    async with _locked(settings, settings.db_name) as connection:
        applied = await _apply(connection, files)
        await migrate_schemas(connection, files, progress)
        return applied


def read_migrations(directory: Path) -> list[Migration]:
    """The migrations of a directory, in order of their numbers.

    Raises:
        ConfigurationError: a file name is not ``0001_some_words.sql``, a number is taken twice, or there is none.
    """
    files: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise ConfigurationError(f"{path}: a migration is named like 0001_some_words.sql")
        if files and files[-1].version == int(match[1]):
            raise ConfigurationError(f"{path}: number {match[1]} is taken by {files[-1].name}")
        content = path.read_bytes()
        files.append(Migration(int(match[1]), path.name, content.decode(), hashlib.sha256(content).hexdigest()))
    if not files:
        raise ConfigurationError(f"{directory}: no migrations found")
    return files


async def _apply(connection: roles.Connection, files: Sequence[Migration]) -> list[str]:
    async with connection.transaction():
        await roles.execute_formatted(connection, queries.CLOSE_SCHEMA, SCHEMA)
        await roles.execute_formatted(connection, queries.OPEN_SCHEMA, SCHEMA)
        await connection.execute(queries.SEARCH_PATH, SCHEMA)
        await connection.execute(queries.CREATE_LEDGER)
        ledger = await connection.fetch(queries.READ_LEDGER)
    new = _not_yet_applied(files, ledger)
    for migration in new:
        async with connection.transaction():
            await connection.execute(queries.SEARCH_PATH, SCHEMA)
            await connection.execute(migration.sql)
            await connection.execute(queries.RECORD_MIGRATION, migration.version, migration.name, migration.checksum)
    return [migration.name for migration in new]


def _not_yet_applied(files: Sequence[Migration], ledger: Sequence[asyncpg.Record]) -> Sequence[Migration]:
    """What remains after the ledger, which has to be a prefix of the files."""
    for position, row in enumerate(ledger):
        if position == len(files) or files[position].version > row["version"]:
            raise ConfigurationError(f"{row['name']} is applied to the database, but its file is not here")
        if files[position].version < row["version"]:
            raise ConfigurationError(f"{files[position].name} is numbered below {row['name']}, which is applied")
        if files[position].checksum != row["checksum"]:
            raise ConfigurationError(
                f"{row['name']} was changed after it had been applied; undo that and write a new migration"
            )
    return files[len(ledger) :]


@contextlib.asynccontextmanager
async def _locked(settings: Settings, database: str) -> AsyncIterator[roles.Connection]:
    """A connection of the owner, while no other process migrates in ``database``."""
    with translated():
        connection = await asyncpg.connect(
            host=settings.db_host,
            port=settings.db_port,
            database=database,
            user=settings.db_user,
            password=settings.db_password.get_secret_value(),
            timeout=_CONNECT_S_MAX,
            server_settings={"lock_timeout": _LOCK_WAIT},
        )
        try:
            await connection.execute(queries.SERIALISE_MIGRATION)
            # A migration that waits for a table lock makes everyone queue behind it: it gives up early instead.
            await connection.execute(queries.LIMIT_LOCK_WAIT)
            yield connection
        finally:
            # Ends the session, and with it the lock.
            await connection.close()
