"""All rows of one tenant, put back a table at a time from lines of JSON.

Lines go into a temporary table by COPY and from there into their table: COPY into a table under row-level security is
refused to every owner who is no superuser.
"""

from __future__ import annotations

import contextlib
import graphlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import TYPE_CHECKING, cast

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.roles import execute_formatted
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.adapters.postgres.tenant_schemas import SHARED, owner_connection
from settler_streams.errors import InvalidRequestError

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction
    from settler_streams.adapters.postgres.roles import Connection
    from settler_streams.ids import TenantId
    from settler_streams.settings import Settings

TENANTS = "tenants"
"""The table whose row of a tenant every other row stands on."""
LOCK_WAIT = "20s"
"""Another restore of the same tenant that was killed lets go as soon as the server notices; one that works, later."""


class TenantRestore:
    """The owner's connection, on which nobody else restores the same tenant meanwhile."""

    def __init__(self, connection: Connection, tenant_id: TenantId) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: Settings, tenant_id: TenantId) -> AsyncIterator[TenantRestore]:
        """Connect as the owner; directly, not through a transaction-mode pooler, since the lock is the session's.

        Raises:
            UnavailableError: the server cannot be reached, fails meanwhile, or the tenant is being restored.
        """
        async with owner_connection(settings) as connection:
            await execute_formatted(connection, queries.SET_LOCK_WAIT_TO, LOCK_WAIT)
            await connection.fetchval(queries.SERIALISE_RESTORE, tenant_id)
            yield cls(connection, tenant_id)

    async def layout(self) -> int:
        """The number of the last migration."""
        return int(await self._connection.fetchval(queries.LAST_MIGRATION))

    async def holders(self) -> list[str]:
        """The tables that hold a row of the tenant, its schema if there is one."""
        async with self.transaction():
            if await self._connection.fetchval(queries.SCHEMA_IS_THERE, self._tenant_id):
                return ["a schema of its own"]
            found = []
            for (table,) in await self._connection.fetch(queries.TABLES_WITH_TENANTS):
                values = [table, _tenant_column(table), self._tenant_id]
                if await self._connection.fetchval(
                    await self._connection.fetchval(queries.FORMAT, queries.HOLDS_ROW, values)
                ):
                    found.append(str(table))
            return found

    async def has_tenant(self, other: TenantId) -> bool:
        """Whether there is such a tenant."""
        async with self.transaction():
            await TenantContext.set(self._connection, other)
            return bool(await self._connection.fetchval(queries.TENANT_EXISTS, other))

    async def audited(self, action: str, subject: str) -> bool:
        """Whether the tenant's audit log has such an entry."""
        async with self.transaction():
            return bool(await self._connection.fetchval(queries.AUDITED, self._tenant_id, action, subject))

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """One transaction in the tenant's context; leaving with an exception rolls it back."""
        async with self._connection.transaction():
            await TenantContext.set(self._connection, self._tenant_id)
            yield cast("Transaction", self._connection)  # the same calls, without a pool around it

    async def begin(self) -> None:
        """Within the transaction, before the first table."""
        await self._connection.execute(queries.CREATE_LINES)

    async def give_schema(self) -> None:
        """Within the transaction, once the tenant itself is there: what follows goes into a schema of its own."""
        await self._connection.execute(queries.CREATE_TENANT_SCHEMA)
        await TenantContext.set(self._connection, self._tenant_id)

    async def in_order(self, tables: Iterable[str]) -> list[str]:
        """The tables, that of tenants first, each of the others behind those that it refers to.

        Most refer to no other; but where a tenant's rows lie is known only once the tenant itself is there.

        Raises:
            InvalidRequestError: a tenant has no rows in one of them.
        """
        wanted = set(tables)
        there = {str(row[0]) for row in await self._connection.fetch(queries.TABLES_OF_TENANTS)}
        if unknown := sorted(wanted - there):
            raise InvalidRequestError(f"tenants have no rows in {', '.join(unknown)}")
        graph: dict[str, set[str]] = {table: {TENANTS} - {table} for table in sorted(wanted)}
        for table, other in await self._connection.fetch(queries.REFERENCES):
            if table in wanted and other in wanted:
                graph[table].add(other)
        return list(graphlib.TopologicalSorter(graph).static_order())

    async def insert(self, table: str, lines: AsyncIterable[bytes]) -> int:
        """Within the transaction: write the rows that ``lines`` hold, one JSON object a line; returns how many.

        Rows of another tenant are passed over. Errors of the server come as they are.
        """
        await self._connection.execute(queries.EMPTY_LINES)
        await self._connection.copy_to_table(
            queries.LINES_TABLE, schema_name="pg_temp", source=lines, timeout=None,
            # As they were written: no character of a line is ever quoted or escaped.
            format="csv", delimiter="\x01", quote="\x02",
        )  # fmt: skip
        columns = [
            str(column) for of, column in await self._connection.fetch(queries.STORED_COLUMNS, SHARED) if of == table
        ]
        template = queries.INSERT_LINES.format(", ".join(["%I"] * len(columns)), ", ".join(["t.%I"] * len(columns)))
        values = [table, *columns, *columns, table, _tenant_column(table), self._tenant_id]
        insert = await self._connection.fetchval(queries.FORMAT, template, values)
        return int((await self._connection.execute(insert, timeout=None)).rpartition(" ")[2])

    async def finish(self, parent_id: TenantId | None) -> None:
        """Within the transaction, after the last table: what no tenant's export holds.

        Its webhooks get lanes, its parent knows it again, and it forgets children that are not there: each of them is
        known again once it is restored.
        """
        await self._connection.execute(queries.FORGET_MISSING_CHILDREN, self._tenant_id)
        await self._connection.execute(queries.RESTORE_LANES, self._tenant_id)
        if parent_id is not None:
            created_at = await self._connection.fetchval(queries.CREATED_AT, self._tenant_id)
            await TenantContext.set(self._connection, parent_id)
            await self._connection.execute(queries.RESTORE_CHILD, parent_id, self._tenant_id, created_at)
            await TenantContext.set(self._connection, self._tenant_id)


def _tenant_column(table: str) -> str:
    return "id" if table == TENANTS else "tenant_id"
