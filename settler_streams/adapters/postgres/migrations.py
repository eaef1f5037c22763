"""Bring the database to the schema that the files under ``schemas/postgres/`` describe, or back to an earlier one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from settler_streams.adapters.postgres import queries, roles
from settler_streams.adapters.postgres.migration_files import Migration, read_migrations
from settler_streams.adapters.postgres.migrations_back import go_back
from settler_streams.adapters.postgres.server_version import refuse_unsafe
from settler_streams.adapters.postgres.tenant_schemas import (
    IDLE_MAX,
    SHARED,
    Progress,
    migrate_schemas,
    owner_connection,
)
from settler_streams.errors import ConfigurationError
from settler_streams.published import MIGRATIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from settler_streams.settings import Settings

# Exists in every cluster; connected to while the database itself may be missing.
_MAINTENANCE_DATABASE = "postgres"

# Another process that migrates holds the lock for as long as its migrations take; an index over a large table is the
# longest of them.
_LOCK_WAIT = "600s"


class Migrated(NamedTuple):
    """The names of the migrations that were applied, or undone, each in that order."""

    applied: list[str]
    undone: list[str]


async def migrate(
    settings: Settings, *, directory: Path = MIGRATIONS, progress: Progress = lambda _done, _all: None
) -> list[str]:
    """:func:`migrate_to` the last migration; returns the names of those that were applied."""
    return (await migrate_to(settings, None, directory=directory, progress=progress)).applied


async def migrate_to(
    settings: Settings,
    to: int | None,
    *,
    discard_data: bool = False,
    directory: Path = MIGRATIONS,
    progress: Progress = lambda _done, _all: None,
) -> Migrated:
    """Create what is missing (roles, database), then apply each new migration in a transaction of its own.

    Schemas of single tenants follow, each in a transaction of its own; ``progress`` is told of them. Where the database
    is beyond ``to``, migrations are undone instead, schemas of tenants first (:func:`go_back`).

    Run as often as wanted, by any number of processes at once: one works, the others wait and find nothing left to do.
    The owner connects directly, not through a transaction-mode pooler, because the lock belongs to its session.

    Args:
        settings: of the deployment.
        to: the number of the migration to arrive at; 0 for none, None for the last.
        discard_data: on the way back, delete what the database cannot hold there.
        directory: of the migrations.
        progress: told how many schemas of tenants are done.

    Raises:
        ConfigurationError: a file was changed, removed or numbered below one that is already applied; a file name is
            malformed or a number taken twice; the role names collide; the server has a known way around row-level
            security; a tenant's schema has another layout than the shared one; no migration has that number, or nothing
            undoes one.
        ConflictError: going back would delete data, or a tenant's schema could not be found any more.
        UnavailableError: the server cannot be reached, another migration runs for longer than the lock wait, or this
            process stood still for so long that the server ended it.
    """
    roles.check_role_names(settings)
    files = read_migrations(directory)
    if to is None:
        to = files[-1].version
    elif to and to not in (file.version for file in files):
        raise ConfigurationError(f"no migration has the number {to}; the last one is {files[-1].name}")
    # Roles are shared by all databases of the cluster, and an advisory lock holds in one database only.
    async with _locked(settings, _MAINTENANCE_DATABASE) as maintenance:
        refuse_unsafe(await maintenance.fetchval(queries.SERVER_VERSION))
        await roles.create_roles(maintenance, settings)
        await roles.create_database(maintenance, settings)
    async with _locked(settings, settings.db_name) as connection:
        applied = await _applied(connection, files)
        wanted = [file for file in files if file.version <= to]
        if len(applied) > len(wanted):
            return Migrated([], await go_back(connection, applied, to, discard_data=discard_data, progress=progress))
        new = wanted[len(applied) :]
        for migration in new:
            await _apply(connection, migration)
        await migrate_schemas(connection, wanted, progress)
        return Migrated([migration.name for migration in new], [])


async def _apply(connection: roles.Connection, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(queries.SEARCH_PATH, SHARED)
        await connection.execute(migration.sql)
        await connection.execute(queries.RECORD_MIGRATION, migration.version, migration.name, migration.checksum)


async def _applied(connection: roles.Connection, files: Sequence[Migration]) -> Sequence[Migration]:
    """Those that the ledger has, which have to be a prefix of the files."""
    async with connection.transaction():
        await roles.execute_formatted(connection, queries.CLOSE_SCHEMA, SHARED)
        await roles.execute_formatted(connection, queries.OPEN_SCHEMA, SHARED)
        await connection.execute(queries.SEARCH_PATH, SHARED)
        await connection.execute(queries.CREATE_LEDGER)
        ledger = await connection.fetch(queries.READ_LEDGER)
    for position, row in enumerate(ledger):
        if position == len(files) or files[position].version > row["version"]:
            raise ConfigurationError(f"{row['name']} is applied to the database, but its file is not here")
        if files[position].version < row["version"]:
            raise ConfigurationError(f"{files[position].name} is numbered below {row['name']}, which is applied")
        if files[position].checksum != row["checksum"]:
            raise ConfigurationError(
                f"{row['name']} was changed after it had been applied; undo that and write a new migration"
            )
    return files[: len(ledger)]


@contextlib.asynccontextmanager
async def _locked(settings: Settings, database: str) -> AsyncIterator[roles.Connection]:
    """A connection of the owner, while no other process migrates in ``database``."""
    async with owner_connection(
        settings, database, lock_timeout=_LOCK_WAIT, idle_in_transaction_session_timeout=IDLE_MAX
    ) as connection:
        await connection.execute(queries.SERIALISE_MIGRATION)
        # A migration that waits for a table lock makes everyone queue behind it: it gives up early instead.
        await connection.execute(queries.LIMIT_LOCK_WAIT)
        yield connection
    # The session has ended, and with it the lock.
