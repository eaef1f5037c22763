"""Undo migrations, the latest first, without deleting anything that nobody agreed to delete.

What a migration takes away when it is undone is not declared anywhere: it is undone on trial, and the catalogue before
is compared with the one behind it. Whatever of that holds rows is counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.migration_files import BACK, TENANT_SCOPE, Migration
from settler_streams.adapters.postgres.roles import execute_formatted
from settler_streams.adapters.postgres.tenant_schemas import SHARED, Progress, enter, schemas, tenant_of
from settler_streams.errors import ConfigurationError, ConflictError

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.roles import Connection

_Lost = Mapping[str, Sequence[str]]
"""Table to the columns that it loses; to none if it goes itself."""


async def go_back(
    connection: Connection, applied: Sequence[Migration], to: int, *, discard_data: bool, progress: Progress
) -> list[str]:
    """Undo every applied migration above ``to``, each in one transaction together with its row of the ledger.

    Schemas of single tenants go first, each in one transaction all the way. Whatever is killed half-way leaves each
    schema at some migration's state, from which both directions go on.

    Args:
        connection: the owner's, who holds the lock under which migrations are applied.
        applied: the migrations that the ledger has, in order.
        to: the number to arrive at; 0 undoes all.
        discard_data: delete what the database cannot hold there.
        progress: told of the schemas of tenants.

    Returns:
        The names of what was undone, in that order.

    Raises:
        ConfigurationError: nothing undoes one of the migrations.
        ConflictError: data would be deleted, or a tenant has a schema that could not be found any more. Nothing has
            been undone, unless that could not be foreseen: then what was undone before its step stays undone.
    """
    undone = [migration for migration in reversed(applied) if migration.version > to]
    if lacking := [f"{BACK}/{migration.name}" for migration in undone if migration.back is None]:
        raise ConfigurationError(f"nothing goes back without {', '.join(lacking)}; write what undoes the migration")
    await _refuse_losses_anywhere(connection, undone, discard_data=discard_data)
    await _schemas_back(connection, undone, to, discard_data=discard_data, progress=progress)
    for migration in undone:
        async with connection.transaction():
            await connection.execute(queries.SEARCH_PATH, SHARED)
            await _refuse_losses(connection, SHARED, [migration], discard_data=discard_data)
            await _undo(connection, [migration])
            await connection.execute(queries.FORGET_MIGRATION, migration.version)
    return [migration.name for migration in undone]


async def _schemas_back(
    connection: Connection, undone: Sequence[Migration], to: int, *, discard_data: bool, progress: Progress
) -> None:
    total, done = int(await connection.fetchval(queries.SCHEMAS_COUNT)), 0
    async for schema in schemas(connection):
        async with connection.transaction():
            layout = await enter(connection, schema)
            if layout is not None and layout > to:
                own = [m for m in undone if m.version <= layout and m.sql.startswith(TENANT_SCOPE)]
                await _refuse_losses(connection, schema, own, discard_data=discard_data)
                await _undo(connection, own)
                await connection.execute(queries.RECORD_LAYOUT, tenant_of(schema), to)
        done += 1
        progress(done, max(total, done))


async def _refuse_losses_anywhere(connection: Connection, undone: Sequence[Migration], *, discard_data: bool) -> None:
    """Before anything is undone: what all of it together would take away, in every schema."""
    held: Counter[str] = Counter()
    async with _undone_afterwards(connection):
        await connection.execute(queries.SEARCH_PATH, SHARED)
        lost = await _foreseen(connection, undone)
        if not discard_data:
            held.update(await _held(connection, SHARED, lost))
    if not discard_data:
        async for schema in schemas(connection):
            async with _undone_afterwards(connection):
                held.update(await _held(connection, schema, lost))
    _refuse_held(held)


async def _foreseen(connection: Connection, undone: Sequence[Migration]) -> _Lost:
    """What is lost in the shared schema, but for what cannot be tried while tenants' schemas need something that goes.

    That is, a function that their policies call: they let go of it in their own turn, and its step counts alone.
    """
    has_schemas = bool(await connection.fetchval(queries.SCHEMAS_COUNT))

    async def undo() -> None:
        for migration in undone:
            try:
                async with connection.transaction():
                    await _undo(connection, [migration])
            except asyncpg.DependentObjectsStillExistError:
                if not has_schemas:
                    raise

    return await _lost_by(connection, SHARED, undo)


async def _refuse_losses(
    connection: Connection, schema: str, undone: Sequence[Migration], *, discard_data: bool
) -> None:
    """Within the transaction that undoes them. Tables that lose something are locked: what was counted stays true."""
    lost = await _lost(connection, schema, undone)
    for table in sorted(lost):
        await execute_formatted(connection, queries.LOCK_TABLE, schema, table)
    if not discard_data:
        _refuse_held(await _held(connection, schema, lost))


async def _lost(connection: Connection, schema: str, undone: Iterable[Migration]) -> _Lost:
    """What is gone once they are undone, found by undoing them and taking that back."""
    return await _lost_by(connection, schema, lambda: _undo(connection, undone))


async def _lost_by(connection: Connection, schema: str, undo: Callable[[], Awaitable[None]]) -> _Lost:
    async with _undone_afterwards(connection):
        before = await _columns(connection, schema)
        await undo()
        after = await _columns(connection, schema)
    return {
        table: sorted(columns - after.get(table, set())) if table in after else ()
        for table, columns in before.items()
        if columns - after.get(table, set())
    }


async def _columns(connection: Connection, schema: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for table, column in await connection.fetch(queries.STORED_COLUMNS, schema):
        found.setdefault(table, set()).add(column)
    return found


async def _held(connection: Connection, schema: str, lost: _Lost) -> dict[str, int]:
    """How many rows of the schema hold something of what is lost, by table."""
    there = await _columns(connection, schema)
    held = {}
    async with _undone_afterwards(connection):
        for table, columns in lost.items():
            kept = sorted(there.get(table, set()).intersection(columns))
            if table not in there or (columns and not kept):
                continue
            # An owner who is no superuser would be shown no row. Row security off: an error, never fewer rows.
            await execute_formatted(connection, queries.UNFORCE_TABLE, schema, table)
            await connection.execute(queries.ROW_SECURITY_OFF)
            name = f"{table} ({', '.join(columns)})" if columns else table
            counted = await connection.fetchval(queries.FORMAT, queries.COUNT_ROWS, [schema, table])
            if columns:
                counted += await connection.fetchval(
                    queries.FORMAT, queries.WHERE_ANY_OF.format(", ".join(["%I"] * len(kept))), kept
                )
            held[name] = int(await connection.fetchval(counted))
    return held


async def _undo(connection: Connection, undone: Iterable[Migration]) -> None:
    for migration in undone:
        await connection.execute(migration.back or "")
        if count := await connection.fetchval(queries.SCHEMAS_UNKNOWN):
            raise ConflictError(
                f"tenants have schemas of their own ({count}), which nothing knows of without {migration.name}; "
                "`settler tenants schema check` lists them, `settler tenants schema move <tenant> shared` puts one back"
            )


def _refuse_held(held: Mapping[str, int]) -> None:
    if found := [f"{name}: {rows} rows" for name, rows in sorted(held.items()) if rows]:
        raise ConflictError(
            f"going back would delete {'; '.join(found)}. Export what is needed, then say --discard-data to delete it"
        )


@contextlib.asynccontextmanager
async def _undone_afterwards(connection: Connection) -> AsyncIterator[None]:
    """A transaction, or a savepoint within one, of which nothing stays."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()
