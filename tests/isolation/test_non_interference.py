"""Whatever runs in A's context says the same, whatever the other tenants have: rows, counts, errors, messages.

SETTLER_ISOLATION_STATEMENTS is the number of made statements (5,000), SETTLER_ISOLATION_SEED where they begin.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import uuid
from pathlib import Path

import asyncpg
import pytest

from settler_streams.adapters.postgres import queries as adapter_queries
from settler_streams.services import queries as service_queries
from settler_streams.services.webhooks import queries as webhook_queries
from tests.isolation.made_sql import Maker, Table
from tests.isolation.probe import A, B
from tests.isolation.twins import MARK, answers, make_twins, said, session, with_and_without_others

pytestmark = [pytest.mark.services, pytest.mark.slow]

STATEMENTS = int(os.environ.get("SETTLER_ISOLATION_STATEMENTS") or 5_000)
SEED = int(os.environ.get("SETTLER_ISOLATION_SEED") or 0)
BATCH = 200
PACKAGE = Path(adapter_queries.__file__).parents[2]

APPLICATION_SQL = {
    f"{module.__name__.rsplit('.', 2)[-2]}.{name}": text
    for module in (adapter_queries, service_queries, webhook_queries)
    for name, text in vars(module).items()
    if name.isupper() and isinstance(text, str)
}


@pytest.fixture(scope="module")
async def twins(cluster_settings):
    return await make_twins(cluster_settings)


@pytest.fixture
async def sessions(twins):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(session(twin)) for twin in twins.values()]


def sql_in(path: Path) -> list[str]:
    """The texts in a module that begin as SQL does."""
    return [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.match(r"\s*(SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH|MERGE|COPY|LOCK|CALL)\s+[\w*(\"']", node.value)
    ]  # fmt: skip


def test_no_application_sql_stands_elsewhere():
    """The catalogue's and the development tools' statements are sent by no service."""
    known = {"adapters/postgres/queries.py", "services/queries.py", "services/webhooks/queries.py",
             "adapters/postgres/catalogue.py", "adapters/postgres/inventory.py"}  # fmt: skip
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if sql_in(path)}
    assert {name for name in found - known if not name.startswith("dev/")} == set()
    assert {"adapters/postgres/queries.py", "services/queries.py"} <= found


VALUES = {
    "uuid": [A, B, str(uuid.uuid5(uuid.UUID(A), "0")), str(uuid.uuid5(uuid.UUID(B), "0")), str(uuid.uuid4())],
    "text": ["a0@b", f"{MARK}much0@b", A, "{}", "storage"], "int8": [0, 1, 10, 2**40, 5], "int4": [0, 1, 2, 3, 4],
    "bytea": [b"", b"x" * 32, b"a", b"b", b"c"], "timestamptz": [None] * 5,
}  # fmt: skip


@pytest.mark.parametrize("name", APPLICATION_SQL)
async def test_application_sql_says_the_same(sessions, name):
    statement = APPLICATION_SQL[name]
    shapes = []
    for connection in sessions:
        await connection.execute("SAVEPOINT shape")
        try:
            shapes.append([parameter.name for parameter in (await connection.prepare(statement)).get_parameters()])
        except Exception as error:  # noqa: BLE001 - whatever it says, it says it of all
            shapes.append([str(error)])
        await connection.execute("ROLLBACK TO shape")
    assert shapes[0] == shapes[1] == shapes[2]
    for turn in range(5):
        arguments = [
            None if kind.endswith("[]") else VALUES.get(kind, [None] * 5)[(turn + place * (turn // 2)) % 5]
            for place, kind in enumerate(shapes[0])
        ]
        if "PASSWORD" in statement or "%I" in statement:
            arguments = []
        heard = {await said(connection, statement, *arguments) for connection in sessions}
        assert len(heard) == 1, (name, arguments, heard)


async def readable(connection) -> list[Table]:
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


def comparable(statement: str, answer: str) -> str:
    return "a plan" if statement.startswith("EXPLAIN") and not answer.startswith("ERROR") else answer


async def differing(sessions, statements: list[str]) -> dict[str, list[str]]:
    """The statements that are not answered alike, with the answers."""
    heard = [await answers(connection, statements) for connection in sessions]
    rounds = list(zip(statements, zip(*heard, strict=True), strict=True))
    assert [statement for statement, each in rounds if any(leaks(statement, answer) for answer in each)] == []
    return {
        statement: list(each) for statement, each in rounds if len({comparable(statement, one) for one in each}) > 1
    }


async def test_made_statements_say_the_same(twins, sessions):
    maker = Maker(await readable(sessions[0]), SEED)
    for begun in range(0, STATEMENTS, BATCH):
        found = await differing(sessions, [maker.statement() for _ in range(BATCH)])
        # Which of A's rows is met first, and so which of two errors comes first or whether one comes at all, follows
        # from the plan, and the plan from how large the table is for everybody. Rows and counts have no such excuse.
        for statement, each in found.items():
            assert any(answer.startswith("ERROR") for answer in each), (SEED, begun, statement, each)
        # That it is the plan is shown where it stays the same: the others' rows go, and the answer stays.
        for twin in twins.values():
            heard = await with_and_without_others(twin, list(found))
            changed = [
                each for each in zip(found, *heard, strict=True) if comparable(*each[:2]) != comparable(*each[::2])
            ]
            assert changed == [], (SEED, begun)


async def test_made_statements_are_worth_comparing(sessions):
    """Neither silence nor refusals alone would prove anything; and B would be told other things."""
    maker = Maker(await readable(sessions[0]), SEED)
    statements = [maker.statement() for _ in range(1_000)]
    heard = await answers(sessions[-1], statements)
    failed = sum(answer.startswith("ERROR") for answer in heard)
    assert 50 < failed < 800
    assert sum(bool(answer) and not answer.startswith("ERROR") for answer in heard) > 100
    await sessions[-1].execute(f"SET LOCAL app.tenant_id = '{B}'")
    of_b = await answers(sessions[-1], statements)
    assert sum(map(leaks, statements, of_b)) > 10
    assert sum(one != other for one, other in zip(heard, of_b, strict=True)) > 200


async def test_cursors_and_copy_say_the_same(sessions):
    maker = Maker(await readable(sessions[0]), SEED + 1)
    for _ in range(100):
        statement = maker.plain()
        if await differing(sessions, [statement]):
            continue  # which error comes first; the test above looks into that
        assert len({await by_cursor(connection, statement) for connection in sessions}) == 1, statement
        assert len({await by_copy(connection, statement) for connection in sessions}) == 1, statement


async def by_cursor(connection, statement: str) -> str:
    await connection.execute("SAVEPOINT cursor")
    try:
        await connection.execute(f"DECLARE c SCROLL CURSOR FOR {statement}; MOVE ALL FROM c; SAVEPOINT inside")
        backward = await connection.fetch("FETCH BACKWARD ALL FROM c")
        await connection.execute("ROLLBACK TO inside")
        return repr(sorted(map(repr, backward)))
    except asyncpg.PostgresError as error:
        return f"{error.sqlstate} {error}"
    finally:
        await connection.execute("ROLLBACK TO cursor")


async def by_copy(connection, statement: str) -> str:
    copied = bytearray()

    async def take(chunk: bytes) -> None:
        copied.extend(chunk)

    await connection.execute("SAVEPOINT copy")
    try:
        await connection.copy_from_query(statement, output=take)
        return repr(sorted(copied.splitlines()))
    except asyncpg.PostgresError as error:
        return f"{error.sqlstate} {error}"
    finally:
        await connection.execute("ROLLBACK TO copy")
