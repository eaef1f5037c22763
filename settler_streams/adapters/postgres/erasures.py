"""A tenant's erasure in Postgres: the record of it, and the tenant's rows, deleted in batches by the eraser.

Whatever this program asks for, the database lets the eraser delete rows of a tenant whose erasure has begun and has not
ended, and begin one only of a tenant that is due (``0016_erasure.sql``). Several may erase one tenant at a time: they
take turns, a batch each, so every row is counted once.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, NamedTuple

from settler_streams.adapters.postgres import outbox, queries
from settler_streams.adapters.postgres.tenant_schemas import SHARED
from settler_streams.errors import ConflictError, NotFoundError
from settler_streams.ids import TenantId

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.adapters.postgres.pool import TenantConnectionPool, Transaction

BATCH_ROWS_MAX = 10_000
"""Rows of one transaction: some tenths of a second, so that a kill undoes little."""

OnBatch = Callable[[str, int], None]
"""Told the table and how many rows have gone, after each transaction."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """The record that stays. ``steps`` are those done; ``counts`` says how much there was, by place."""

    tenant_id: TenantId
    root_id: TenantId
    version: int
    asked_by: str
    begun_at: dt.datetime
    ended_at: dt.datetime | None
    steps: tuple[str, ...]
    counts: Mapping[str, int]


class _Table(NamedTuple):
    schema: str
    name: str


async def read(pool: TenantConnectionPool, tenant_id: TenantId) -> Erasure | None:
    """The record of a tenant's erasure; None when none has begun."""
    async with pool.eraser(tenant_id) as tx:
        return _erasure(await tx.fetchrow(queries.READ_ERASURE, tenant_id))


async def begin(pool: TenantConnectionPool, tenant_id: TenantId, asked_by: str) -> Erasure:
    """Record that the tenant is being erased, once; from then on no other door opens for it.

    Raises:
        ConflictError: the tenant is not deleted, its grace period is not over, or a child of it is not erased.
        NotFoundError: there is no such tenant.
        UnavailableError: transactions of the tenant did not end in time.
    """
    if (begun := await read(pool, tenant_id)) is not None:
        return begun
    async with pool.eraser(tenant_id, alone=True) as tx:
        if (begun := _erasure(await tx.fetchrow(queries.READ_ERASURE, tenant_id))) is not None:
            return begun
        tenant = await tx.fetchrow(queries.TENANT_TO_ERASE, tenant_id)
        if tenant is None:
            raise NotFoundError(f"no tenant {tenant_id}")
        if tenant["erase_after"] is None:
            raise ConflictError(f"tenant {tenant_id} is {tenant['status']}; only what was deleted can be erased")
        if not tenant["due"]:
            raise ConflictError(
                f"tenant {tenant_id} can be restored until {tenant['erase_after']:%Y-%m-%d %H:%M:%S} UTC"
            )
        if tenant["child"] is not None:
            raise ConflictError(f"tenant {tenant_id} has a child, {tenant['child']}; erase that first")
        row = await tx.fetchrow(
            queries.BEGIN_ERASURE, tenant_id, tenant["root_id"], tenant["version"] + 1, asked_by
        )  # fmt: skip
    erasure = _erasure(row)
    assert erasure is not None  # noqa: S101 - the statement returns what it inserted
    return erasure


async def announce(pool: TenantConnectionPool, erasure: Erasure, step: str, event: bytes) -> bool:
    """Leave the event of the erasure in the outbox, unless ``step``, which it belongs to, is done: False."""
    async with pool.eraser(erasure.tenant_id) as tx:
        await tx.fetchval(queries.ONE_ERASER, erasure.tenant_id)
        record = _erasure(await tx.fetchrow(queries.READ_ERASURE, erasure.tenant_id))
        if record is None or step in record.steps or record.ended_at is not None:
            return False
        await outbox.append(tx, erasure.tenant_id, "tenant-changes", erasure.root_id, event)
        return True


async def delete_rows(pool: TenantConnectionPool, tenant_id: TenantId, on_batch: OnBatch) -> None:
    """Delete every row of the tenant, then its schema, its slug and its own row.

    1. The tables are taken from the catalogue, those that refer to others first.
    2. Each is emptied in transactions of bounded size, which count what they delete.
    3. What is left of the tenant goes in one.
    """
    async with pool.eraser(tenant_id) as tx:
        tables = await _tables(tx, tenant_id)
    for table in tables:
        deleted = BATCH_ROWS_MAX
        while deleted:
            async with pool.eraser(tenant_id) as tx:
                await tx.fetchval(queries.ONE_ERASER, tenant_id)
                deleted = await _delete(tx, tenant_id, table)
            if deleted:
                on_batch(table.name, deleted)
    async with pool.eraser(tenant_id) as tx:
        await tx.fetchval(queries.ONE_ERASER, tenant_id)
        erasure = _erasure(await tx.fetchrow(queries.READ_ERASURE, tenant_id))
        if erasure is not None and erasure.ended_at is None:
            await tx.fetchval(queries.FORGET_TENANT)
    on_batch("tenants", 1)


async def rows_left(pool: TenantConnectionPool, tenant_id: TenantId) -> dict[str, int]:
    """How many rows of the tenant there are, by table; only tables that have some."""
    found: dict[str, int] = {}
    async with pool.eraser(tenant_id) as tx:
        for table in await _tables(tx, tenant_id):
            found[table.name] = found.get(table.name, 0) + int(
                await tx.fetchval(await _formatted(tx, queries.COUNT_TENANT_ROWS, *table, tenant_id))
            )
        found["tenants"] = int(await tx.fetchval(queries.TENANT_EXISTS, tenant_id))
        found["tenant_schemas"] = int(await tx.fetchval(queries.SCHEMA_OF, tenant_id) is not None)
    return {name: rows for name, rows in found.items() if rows}


async def add_count(pool: TenantConnectionPool, tenant_id: TenantId, place: str, number: int) -> None:
    """So many more have gone there."""
    async with pool.eraser(tenant_id) as tx:
        await tx.execute(queries.COUNT_ERASED, tenant_id, place, number)


async def note_counts(pool: TenantConnectionPool, tenant_id: TenantId, counts: Mapping[str, int]) -> None:
    """Keep what was counted, unless an earlier look at the same place was kept."""
    async with pool.eraser(tenant_id) as tx:
        await tx.execute(queries.NOTE_COUNTS, tenant_id, json.dumps(counts))


async def step_done(pool: TenantConnectionPool, tenant_id: TenantId, step: str) -> None:
    """A step need not be repeated."""
    async with pool.eraser(tenant_id) as tx:
        await tx.fetchval(queries.ONE_ERASER, tenant_id)
        await tx.execute(queries.STEP_DONE, tenant_id, step)


async def step_undone(pool: TenantConnectionPool, tenant_id: TenantId, step: str) -> None:
    """A step has to be repeated: something was left, or came again."""
    async with pool.eraser(tenant_id) as tx:
        await tx.execute(queries.STEP_UNDONE, tenant_id, step)


async def end(pool: TenantConnectionPool, tenant_id: TenantId) -> None:
    """The erasure has ended; its record does not change any more."""
    async with pool.eraser(tenant_id) as tx:
        await tx.execute(queries.END_ERASURE, tenant_id)


def _erasure(row: asyncpg.Record | None) -> Erasure | None:
    if row is None:
        return None
    return Erasure(
        tenant_id=TenantId(str(row["tenant_id"])),
        root_id=TenantId(str(row["root_id"])),
        version=row["version"],
        asked_by=row["asked_by"],
        begun_at=row["begun_at"],
        ended_at=row["ended_at"],
        steps=tuple(row["steps"]),
        counts=json.loads(row["counts"]),
    )


async def _tables(tx: Transaction, tenant_id: TenantId) -> list[_Table]:
    """The tables that may hold rows of the tenant, each before those that it refers to."""
    rows = await tx.fetch(queries.TABLES_TO_ERASE, tenant_id)
    order: TopologicalSorter[_Table] = TopologicalSorter()
    known = {_Table(row["schema"], row["name"]) for row in rows}
    for row in rows:
        table = _Table(row["schema"], row["name"])
        order.add(table)
        for name in row["refers_to"]:
            if (target := _Table(row["schema"], name)) in known:
                order.add(target, table)
    return list(order.static_order())


async def _delete(tx: Transaction, tenant_id: TenantId, table: _Table) -> int:
    if table.schema != SHARED and await tx.fetchval(queries.SCHEMA_OF, tenant_id) is None:
        return 0  # it went with the last step of another eraser, after the tables were listed
    statement = await _formatted(tx, queries.ERASE_ROWS, *table, tenant_id, str(BATCH_ROWS_MAX))
    deleted = int((await tx.execute(statement)).rpartition(" ")[2])
    if deleted:
        await tx.execute(queries.COUNT_ERASED, tenant_id, f"table/{table.name}", deleted)
    return deleted


async def _formatted(tx: Transaction, statement: str, *values: str) -> str:
    """A statement whose names and values the server has quoted."""
    return str(await tx.fetchval(queries.FORMAT, statement, list(values)))
