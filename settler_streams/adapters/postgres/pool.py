"""The only door to Postgres for a service: one checked-out connection, one transaction, one tenant."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
import structlog

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.failures import DRIVER_ERRORS, translated
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId, canonical_tenant

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from settler_streams.settings import Settings

    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record]
    Transaction: TypeAlias = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    """A connection inside its transaction, with its context set: what each door hands out."""

_log = structlog.get_logger(__name__)

# Longest single statement. The largest one writes a chunk of 10,000 result rows, well under a second; a statement
# that takes longer than this is stuck, and is cancelled.
_STATEMENT_S_MAX = 30.0

# Longer than a batch takes; a shutdown that waits longer is killed from outside, which ends the same way.
_CLOSE_S_MAX = 10.0


class TenantConnectionPool:
    """A bounded pool of connections of the application role.

    ``tenant()`` is the door for everything that belongs to a tenant. ``platform()`` is for what belongs to nobody
    (stream positions) or to the platform itself (global flags), under the nil UUID. ``relay()`` is for the outbox,
    ``courier()`` for the lanes of webhooks, ``janitor()`` for what is past a tenant's retention, ``eraser()`` for a
    tenant that is being erased, whom all other doors refuse.
    A connection comes back without a context or is closed.
    """

    def __init__(
        self, primary: Pool, replica: Pool | None, *, wait_ms_max: int, on_wait: Callable[[float], None] | None
    ) -> None:
        self._primary = primary
        self._replica = replica
        self._wait_ms_max = wait_ms_max
        self._on_wait = on_wait

    @classmethod
    async def open(cls, settings: Settings, *, on_wait: Callable[[float], None] | None = None) -> TenantConnectionPool:
        """Connect as the application role, and to the read replica when there is one.

        Args:
            settings: where to connect, how many connections, how long to wait for one.
            on_wait: told the seconds that each check-out waited.

        Raises:
            ConfigurationError: the role could bypass row-level security (it is a superuser, has BYPASSRLS, or owns a
                relation, itself or through a role it belongs to), a table of the database is not under it, or the
                login is refused.
            UnavailableError: the server cannot be reached in time.
        """
        primary = await _open_pool(settings, settings.db_host)
        try:
            await _refuse_open_tables(primary, settings)
            replica = await _open_pool(settings, settings.db_read_host) if settings.db_read_host else None
        except BaseException:
            primary.terminate()
            raise
        return cls(primary, replica, wait_ms_max=settings.db_pool_wait_ms, on_wait=on_wait)

    async def close(self) -> None:
        """Wait a while for the connections in use, then close all of them."""
        for pool in (self._primary, self._replica):
            if pool is None:
                continue
            try:
                await asyncio.wait_for(pool.close(), _CLOSE_S_MAX)
            except TimeoutError:
                _log.warning("pool closed while connections were in use", after_s=_CLOSE_S_MAX)
                pool.terminate()

    @contextlib.asynccontextmanager
    async def tenant(self, tenant_id: TenantId, *, read_only: bool = False) -> AsyncIterator[Transaction]:
        """One transaction in the context of ``tenant_id``; leaving with an exception rolls it back.

        Args:
            tenant_id: whose rows can be seen and written.
            read_only: refuse writes, and read from the replica (which may lag behind) when there is one; when that one
                fails, nothing else is asked.

        Raises:
            NotFoundError: the tenant was erased, or is being erased.
            UnavailableError: no connection came free within ``db_pool_wait_ms``, the server failed, or the tenant was
                moved while the replica was asked, which may have missed its rows.
            ValueError: ``tenant_id`` is not a UUID in canonical form.
        """
        pool = self._replica if read_only and self._replica is not None else self._primary
        async with self._transaction(pool, read_only=read_only) as transaction:
            await TenantContext.set(transaction, tenant_id)
            yield transaction
            # The lock that keeps a tenant in its place is the primary's: a replica replays a move amid a read.
            if pool is self._replica and not await transaction.fetchval(queries.IS_IN_PLACE):
                raise UnavailableError(f"tenant {tenant_id} was moved while it was read; read again")

    @contextlib.asynccontextmanager
    async def platform(self) -> AsyncIterator[Transaction]:
        """One transaction in the context of the platform (nil UUID).

        No tenant's row can be seen, but for two facts: who has a schema of its own, and who was erased.
        """
        async with self.tenant(PLATFORM) as transaction:
            yield transaction

    @contextlib.asynccontextmanager
    async def relay(self) -> AsyncIterator[Transaction]:
        """One transaction as the outbox relay: every tenant's outbox rows, and nothing else in the database."""
        async with self.tenant(PLATFORM) as transaction:
            await transaction.execute(queries.BECOME_RELAY)
            yield transaction

    @contextlib.asynccontextmanager
    async def courier(self) -> AsyncIterator[Transaction]:
        """One transaction as the courier: every webhook's lane, and nothing else in the database."""
        async with self.tenant(PLATFORM) as transaction:
            await transaction.execute(queries.BECOME_COURIER)
            yield transaction

    @contextlib.asynccontextmanager
    async def janitor(self, tenant_id: TenantId) -> AsyncIterator[Transaction]:
        """One transaction in the tenant's context that may delete what is past the tenant's retention, and no more."""
        async with self.tenant(tenant_id) as transaction:
            await transaction.execute(queries.BECOME_JANITOR)
            yield transaction

    @contextlib.asynccontextmanager
    async def eraser(self, tenant_id: TenantId, *, alone: bool = False) -> AsyncIterator[Transaction]:
        """One transaction that may delete the rows of a tenant that is being erased, and begin or end its erasure.

        Args:
            tenant_id: whose.
            alone: wait for every other transaction of the tenant, and let none begin.
        """
        async with self._transaction(self._primary, read_only=False) as transaction:
            await transaction.execute(queries.BECOME_ERASER)
            if alone:
                await transaction.fetchval(queries.LOCK_TENANT_SCHEMA, tenant_id)
            await transaction.fetchval(queries.ENTER_ERASURE, canonical_tenant(tenant_id))
            yield transaction

    @contextlib.asynccontextmanager
    async def _transaction(self, pool: Pool, *, read_only: bool) -> AsyncIterator[Transaction]:
        with translated():
            connection = await self._acquire(pool)
            try:
                async with _transaction_of(connection, read_only=read_only):
                    yield connection
            except asyncpg.InterfaceError as error:
                if _is_lost(connection):
                    raise UnavailableError(f"the connection to PostgreSQL was lost: {error}") from error
                raise
            finally:
                await _release(pool, connection)

    async def _acquire(self, pool: Pool) -> Transaction:
        started = time.monotonic()
        try:
            return await pool.acquire(timeout=self._wait_ms_max / 1000)
        except TimeoutError as error:
            raise UnavailableError(f"no database connection came free within {self._wait_ms_max} ms") from error
        finally:
            if self._on_wait is not None:
                self._on_wait(time.monotonic() - started)


@contextlib.asynccontextmanager
async def _transaction_of(connection: Transaction, *, read_only: bool) -> AsyncIterator[None]:
    """As asyncpg's own context manager, which on a lost connection replaces the body's exception (even a
    cancellation) with one that says only that the connection is closed."""
    transaction = connection.transaction(readonly=read_only)
    await transaction.start()
    try:
        yield
    except BaseException:
        try:
            await transaction.rollback()
        except DRIVER_ERRORS as error:
            # The server rolls back by itself when the session ends, so end it; what the body raised says more.
            _log.warning("connection closed: it could not roll back", error=repr(error))
            if not _is_lost(connection):
                connection.terminate()
        raise
    await transaction.commit()


async def _release(pool: Pool, connection: Transaction) -> None:
    """Give a connection back. By now the transaction has its outcome, which a failing reset does not change."""
    try:
        await pool.release(connection)
    except DRIVER_ERRORS as error:
        _log.warning("connection closed: it could not be reset", error=repr(error))


def _is_lost(connection: Transaction) -> bool:
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:  # the pool has already taken the broken connection back
        return True


async def _open_pool(settings: Settings, host: str) -> Pool:
    with translated():
        return await asyncpg.create_pool(
            host=host,
            port=settings.db_port,
            database=settings.db_name,
            user=settings.db_app_user,
            password=settings.db_app_password.get_secret_value(),
            min_size=1,
            max_size=settings.db_pool_size,
            timeout=settings.db_pool_wait_ms / 1000,
            command_timeout=_STATEMENT_S_MAX,
            statement_cache_size=settings.db_statement_cache_size,
            init=_refuse_privileged_login,
            reset=_refuse_leftovers,
        )


async def _refuse_open_tables(pool: Pool, settings: Settings) -> None:
    """One restrictive policy of each table keeps its tenants apart: never serve from a database that has lost it."""
    with translated():
        async with pool.acquire(timeout=settings.db_pool_wait_ms / 1000) as connection:
            found = await violations(connection, essential=True)
    if found:
        raise ConfigurationError(f"the database does not keep its tenants apart: {found[0]}")


async def _refuse_privileged_login(connection: Connection) -> None:
    """Row-level security does not bind superusers, owners that switch it off, or BYPASSRLS: never serve as one."""
    found = await connection.fetchrow(queries.LOGIN_PRIVILEGES)
    if found is None:
        raise ConfigurationError("the login's privileges cannot be read")
    for column, meaning in (
        ("superuser", "is a superuser"),
        ("bypasses_rls", "may bypass row-level security"),
        ("owns_relations", "owns tables"),
    ):
        if found[column]:
            raise ConfigurationError(
                f"role {found['login']!r} {meaning}, itself or through a role it belongs to; "
                "services log in as DB_APP_USER, which must not"
            )


async def _refuse_leftovers(connection: Connection) -> None:
    """Reset a returned connection; close it if it kept a context or a role beyond its transaction.

    RESET ALL alone would hide the first, which is an error of whoever set it, and does not undo the second.
    """
    kept = await connection.fetchval(queries.READ_LEFTOVERS)
    if kept:
        _log.error("connection closed: it kept state of its last transaction", kept=kept)
        connection.terminate()
        return
    await connection.execute(connection.get_reset_query())
