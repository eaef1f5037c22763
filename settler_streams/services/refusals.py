"""What the database's refusals mean to a caller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from settler_streams.errors import ConflictError, InvalidRequestError


@contextmanager
def taken(meaning: str, *, of: str = "row") -> Iterator[None]:
    """Say what a refusal of a row means: a taken value, or a broken rule of the table.

    Raises:
        ConflictError: a value that is unique is there already; it says ``meaning``.
        InvalidRequestError: the row breaks a rule, which the message names.
    """
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        raise ConflictError(meaning) from error
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise InvalidRequestError(f"the {of} breaks a rule of its table: {error}") from error
