"""Whether what A is told of a statement follows from what the other tenants have."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tests.isolation.made_sql import Table
from tests.isolation.twins import MARK, answers, with_and_without_others

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.settings import Settings


SHOWN_MAX = 200
"""Characters of an answer that are printed; it may have hundreds of rows."""


class Difference(NamedTuple):
    """A statement and what it was answered, by name of the database or by what was there."""

    statement: str
    answers: dict[str, str]

    def __str__(self) -> str:
        told = (f"  {where}: {answer[:SHOWN_MAX]!r}" for where, answer in self.answers.items())
        return "\n".join([self.statement, *told])


async def readable(connection: asyncpg.Connection) -> list[Table]:
    """The tables and columns that the login may read, from the catalogue."""
    rows = await connection.fetch(
        "SELECT c.relname, c.relkind = 'v' AS is_view, a.attname, format_type(a.atttypid, NULL) AS kind"
        " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.attgenerated = ''"
        " AND has_table_privilege(c.oid, 'SELECT') AND c.relname <> 'schema_migrations' ORDER BY 1, a.attnum"
    )
    tables: dict[str, Table] = {}
    for name, is_view, column, kind in rows:
        tables.setdefault(name, Table(name, {}, is_view)).columns[column] = kind
    return list(tables.values())


def leaks(statement: str, answer: str) -> bool:
    """Whether the answer has a text of B that was not in the question."""
    return MARK in answer.lower() and MARK not in statement.lower()


async def differing(sessions: Mapping[str, asyncpg.Connection], statements: Sequence[str]) -> list[Difference]:
    """The statements that are not answered alike in ``sessions``, or with a text of B; the sessions work at once."""
    heard = await asyncio.gather(*(answers(connection, statements) for connection in sessions.values()))
    return [
        Difference(statement, dict(zip(sessions, each, strict=True)))
        for statement, *each in zip(statements, *heard, strict=True)
        if not _alike(statement, each) or any(leaks(statement, answer) for answer in each)
    ]


def excusable(difference: Difference) -> bool:
    """Whether the plan may be the reason, which follows from how large a table is for everybody.

    It decides which of A's rows is met first, and so which of two errors comes first or whether one comes at all. Rows
    and counts have no such excuse, and a text of B has none. That it was the plan is for :func:`changed_by_others`
    to show.
    """
    texts = difference.answers.values()
    return any(answer.startswith("ERROR") for answer in texts) and not any(
        leaks(difference.statement, answer) for answer in texts
    )


async def changed_by_others(twins: Mapping[str, Settings], statements: Sequence[str]) -> list[Difference]:
    """The statements whose answer goes with the other tenants' rows where the plan stays the same."""
    found = []
    for name, twin in twins.items():
        for statement, *each in zip(statements, *await with_and_without_others(twin, statements), strict=True):
            if not _alike(statement, each):
                found.append(
                    Difference(statement, dict(zip((f"{name}, with others", f"{name}, without"), each, strict=True)))
                )
    return found


def _alike(statement: str, heard: Sequence[str]) -> bool:
    return len({_comparable(statement, answer) for answer in heard}) == 1


def _comparable(statement: str, answer: str) -> str:
    return "a plan" if statement.startswith("EXPLAIN") and not answer.startswith("ERROR") else answer
