"""All rows of one tenant, a table at a time, as lines of JSON."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, cast

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.roles import execute_formatted
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.adapters.postgres.tenant_schemas import owner_connection
from settler_streams.errors import NotFoundError

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction
    from settler_streams.ids import TenantId
    from settler_streams.settings import Settings

SECRETS = (
    "password_hash", "key_hash", "secret_encrypted", "secret_key_id", "previous_secret_encrypted",
    "previous_secret_key_id", "previous_secret_until", "verification_token", "invitation_hash",
)  # fmt: skip
"""Columns that are of use to nobody but this system."""

LOCK_WAIT = "600s"
"""A move takes about as long as writing the tenant's rows again."""

Sink = Callable[[bytes], Coroutine[Any, Any, None]]


@contextlib.asynccontextmanager
async def tenant_transaction(
    settings: Settings, tenant_id: TenantId, *, snapshot: bool = False
) -> AsyncIterator[Transaction]:
    """A transaction of the owner of the database in the tenant's context; ``snapshot``: that only reads, one moment.

    The owner connects directly, not through a transaction-mode pooler, since a snapshot's lock is the session's.

    Raises:
        NotFoundError: there is no such tenant, or it was erased.
        UnavailableError: the server cannot be reached, fails meanwhile, or the tenant is being moved for too long.
    """
    isolation: Literal["repeatable_read", "read_committed"] = "repeatable_read" if snapshot else "read_committed"
    async with owner_connection(settings) as connection:
        if snapshot:
            # A snapshot is taken by the first statement, also by one that then waits until the tenant has been moved:
            # it would look where the rows are now, and see what was there before. So the wait comes first.
            await execute_formatted(connection, queries.SET_LOCK_WAIT_TO, LOCK_WAIT)
            await connection.fetchval(queries.SHARE_TENANT_SCHEMA, tenant_id)
        async with connection.transaction(isolation=isolation, readonly=snapshot):
            await TenantContext.set(connection, tenant_id)
            if not await connection.fetchval(queries.TENANT_EXISTS, tenant_id):
                raise NotFoundError(f"no tenant {tenant_id}")
            yield cast("Transaction", connection)  # the same calls, without a pool around it


class TenantRows:
    """A tenant's rows as of one moment: the transaction that it was opened in."""

    def __init__(self, connection: Transaction, tenant_id: TenantId) -> None:
        self._connection = connection
        self._tenant_id = tenant_id

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: Settings, tenant_id: TenantId) -> AsyncIterator[TenantRows]:
        """Begin a snapshot. Errors as :func:`tenant_transaction`."""
        async with tenant_transaction(settings, tenant_id, snapshot=True) as connection:
            yield cls(connection, tenant_id)

    async def tables(self) -> list[str]:
        """The tables that may hold rows of the tenant, by name."""
        return [row[0] for row in await self._connection.fetch(queries.TABLES_OF_TENANTS)]

    async def layout(self) -> int:
        """The number of the last migration."""
        return int(await self._connection.fetchval(queries.LAST_MIGRATION))

    async def root_id(self) -> str:
        """The tenant's root: its key in Kafka."""
        return str(await self._connection.fetchval(queries.ROOT_OF, self._tenant_id))

    async def copy(self, table: str, sink: Sink, *, secrets: bool) -> int:
        """Hand every row of the tenant to ``sink``, one JSON object a line, in chunks; returns how many.

        The explicit condition is what chooses the rows: an owner that is a superuser passes the policies.
        """
        column = "id" if table == "tenants" else "tenant_id"
        values = [table, column, self._tenant_id]
        chosen = await self._connection.fetchval(queries.FORMAT, "%I AS t WHERE t.%I = %L", values)
        withheld = [] if secrets else list(SECRETS)
        done = await self._connection.copy_from_query(
            queries.ROWS_AS_JSON + chosen, withheld, output=sink, timeout=None,
            # JSON holds no control character, so nothing in a line is ever quoted or escaped.
            format="csv", delimiter="\x01", quote="\x02",
        )  # fmt: skip
        return int(done.rpartition(" ")[2])
