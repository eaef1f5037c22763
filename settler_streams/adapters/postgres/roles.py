"""The database and the roles: what belongs to the cluster and has to exist before the first migration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from settler_streams.adapters.postgres import queries
from settler_streams.errors import ConfigurationError

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.settings import Settings

    Connection = asyncpg.Connection[asyncpg.Record]

SERVICES = "settler_services"
"""Holds the privileges of the services; the application role is a member."""

RELAY = "settler_relay"
"""Reads and empties the outbox; the application role can switch to it."""

COURIER = "settler_courier"
"""Sees which webhooks have something to send, and takes leases; the application role can switch to it."""

JANITOR = "settler_janitor"
"""Deletes what is past a tenant's retention; the application role can switch to it."""

ERASER = "settler_eraser"
"""Deletes every row of a tenant that is being erased; the application role can switch to it."""

_LIMITS = {
    # A process that is stopped inside a transaction keeps its row locks, and with them the position that its
    # successor waits for. A projection waits for Kafka to take its dead letters, all of them within 10 s; a relay for
    # its events, which are sent again if its transaction is ended meanwhile.
    "idle_in_transaction_session_timeout": "20s",
    # A client that goes in the middle of a message, without a word, is not idle: the server would wait for the rest.
    # The longest honest transaction writes the rows of one attempt, in seconds.
    "transaction_timeout": "60s",
    # Longer than any batch takes; a wait beyond it means that the holder is stuck.
    "lock_timeout": "10s",
}


def check_role_names(settings: Settings) -> None:
    """Refuse settings under which the services would own what they must not.

    Raises:
        ConfigurationError: DB_APP_USER is the owner or one of the group roles.
    """
    if settings.db_app_user in (settings.db_user, SERVICES, RELAY, COURIER, JANITOR, ERASER):
        raise ConfigurationError(
            f"DB_APP_USER: {settings.db_app_user!r} is taken; name a login of its own for the services"
        )


async def create_database(maintenance: Connection, settings: Settings) -> None:
    """Create the database when it is missing; ``maintenance`` is a connection of the owner to another one."""
    if not await maintenance.fetchval(queries.DATABASE_EXISTS, settings.db_name):
        await execute_formatted(maintenance, queries.CREATE_DATABASE, settings.db_name)
    await execute_formatted(maintenance, queries.CLOSE_DATABASE, settings.db_name)
    await execute_formatted(maintenance, queries.OPEN_DATABASE, settings.db_name)


async def create_roles(maintenance: Connection, settings: Settings) -> None:
    """Create the roles that are missing, and take from all of them whatever they must not have."""
    for name in (SERVICES, RELAY, COURIER, JANITOR, ERASER):
        await _create_role(maintenance, queries.CREATE_GROUP, name)
    login = settings.db_app_user
    await _create_role(maintenance, queries.CREATE_LOGIN, login)
    await execute_formatted(maintenance, queries.ALLOW_LOGIN, login, settings.db_app_password.get_secret_value())
    for name, value in _LIMITS.items():
        await execute_formatted(maintenance, queries.LIMIT_LOGIN, login, name, value)
    await execute_formatted(maintenance, queries.JOIN_SERVICES, login)
    await execute_formatted(maintenance, queries.JOIN_RELAY, login)
    await execute_formatted(maintenance, queries.JOIN_COURIER, login)
    await execute_formatted(maintenance, queries.JOIN_JANITOR, login)
    await execute_formatted(maintenance, queries.JOIN_ERASER, login)


async def _create_role(maintenance: Connection, statement: str, name: str) -> None:
    if not await maintenance.fetchval(queries.ROLE_EXISTS, name):
        await execute_formatted(maintenance, statement, name)
    if not await maintenance.fetchval(queries.ROLE_IS_CONFINED, name):
        await execute_formatted(maintenance, queries.CONFINE_ROLE, name)


async def execute_formatted(connection: Connection, statement: str, *values: str) -> None:
    """Run a statement that takes no parameters, with ``values`` quoted by the server itself."""
    await connection.execute(await connection.fetchval(queries.FORMAT, statement, list(values)))
