"""What a failure of Postgres means to the caller: the one place that maps its error codes to our error tree."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.errors import ConfigurationError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Data exceptions, violated constraints, and limits of the program (a key too long for an index, nesting too deep):
# the same row will be refused again, whoever sends it.
_ROW_REFUSED = ("22", "23", "54")

# Connection lost, transaction rolled back (deadlock, serialisation), resources short, operator intervention
# (shutdown, cancelled), lock not available: the same work may succeed later.
_LATER = ("08", "40", "53", "57", "55P03", "25P03")

# Wrong password, unknown database: someone has to change the settings.
_LOGIN_REFUSED = ("28", "3D")

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""All that a call of asyncpg can raise by itself. InternalClientError is what a call meets between the server's
farewell and the end of the connection."""


def refuses_row(error: BaseException) -> bool:
    """Whether ``error`` is about what was sent, so that sending it again is pointless."""
    return isinstance(error, asyncpg.PostgresError) and (error.sqlstate or "").startswith(_ROW_REFUSED)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise our own errors for failures that say nothing about the rows; everything else passes through.

    Raises:
        UnavailableError: the server or the connection to it failed, or a deadline passed. If that happened during a
            commit, its outcome is unknown: whoever needs to know compares a stored position or key.
        ConfigurationError: the server does not accept the login or does not know the database.
    """
    try:
        yield
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state.startswith(_LATER):
            raise UnavailableError(f"PostgreSQL could not answer ({state}): {error}") from error
        if state.startswith(_LOGIN_REFUSED):
            raise ConfigurationError(f"PostgreSQL refuses the login ({state}): {error}") from error
        raise
    except (OSError, TimeoutError, asyncpg.InternalClientError) as error:
        raise UnavailableError(f"the work with PostgreSQL was given up: {error!r}") from error
