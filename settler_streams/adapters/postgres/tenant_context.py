"""Whose rows a connection may see: the setting ``app.tenant_id``, which every row-level policy compares with.

The search path goes with it: a tenant that has a schema of its own finds its tables there.
"""

from __future__ import annotations

from typing import Final, Protocol

import asyncpg

from settler_streams.adapters.postgres import queries
from settler_streams.errors import NotFoundError
from settler_streams.ids import TenantId, canonical_tenant

_ERASED: Final = "SE001"
"""The SQLSTATE that ``enter_tenant`` raises of a tenant that was erased."""


class Queryable(Protocol):
    """The one thing the context needs of a connection."""

    async def fetchval(self, query: str, *args: object) -> object: ...


class TenantContext:
    """Sets and reads the tenant of a connection.

    The context lives as long as the transaction it was set in; outside one it lasts for its own statement, that is,
    not at all. No context means no rows.
    """

    @staticmethod
    async def set(connection: Queryable, tenant_id: TenantId) -> None:
        """Make ``tenant_id`` the tenant of the current transaction.

        Raises:
            NotFoundError: the tenant was erased, or is being erased.
            ValueError: ``tenant_id`` is not a UUID in canonical form.
        """
        try:
            await connection.fetchval(queries.SET_CONTEXT, canonical_tenant(tenant_id))
        except asyncpg.PostgresError as error:
            if error.sqlstate != _ERASED:
                raise
            raise NotFoundError(f"tenant {tenant_id} was erased") from error

    @staticmethod
    async def open(connection: Queryable, tenant_id: TenantId) -> bool:
        """As :meth:`set`, from one tenant's context to another's; but an erased tenant does not end the transaction.

        Returns:
            False: the tenant was erased, or is being erased. The next context has to be set before anything else.

        Raises:
            ValueError: ``tenant_id`` is not a UUID in canonical form.
        """
        return bool(await connection.fetchval(queries.OPEN_CONTEXT, canonical_tenant(tenant_id)))

    @staticmethod
    async def read(connection: Queryable) -> TenantId | None:
        """The tenant of the connection, or None when it has none."""
        value = await connection.fetchval(queries.READ_CONTEXT)
        return None if value is None else TenantId(str(value))
