"""Whatever runs in A's context says the same, whatever the other tenants have: rows, counts, errors, messages.

SETTLER_ISOLATION_STATEMENTS is the number of made statements (10,000), SETTLER_ISOLATION_SEED where they begin.
"""

from __future__ import annotations

import ast
import asyncio
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
from tests.adapters.postgres.conftest import owner_of
from tests.isolation.interference import differing, leaks, readable
from tests.isolation.made_sql import Maker, some_programs, statement_of
from tests.isolation.many_searches import searches
from tests.isolation.probe import A, B
from tests.isolation.search import SEARCHED_MAX, search, shares
from tests.isolation.twins import MARK, answers, make_twins, row_id_of, said, session, weakened
from tests.isolation.weakenings import mutants

pytestmark = [pytest.mark.services, pytest.mark.slow]

STATEMENTS = int(os.environ.get("SETTLER_ISOLATION_STATEMENTS") or 10_000)
SEED = int(os.environ.get("SETTLER_ISOLATION_SEED") or 0)
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
        yield {name: await stack.enter_async_context(session(twin)) for name, twin in twins.items()}


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
    "uuid": [A, B, row_id_of(A, 0), row_id_of(B, 0), str(uuid.uuid4())],
    "text": ["a0@b", f"{MARK}much0@b", A, "{}", "storage"], "int8": [0, 1, 10, 2**40, 5], "int4": [0, 1, 2, 3, 4],
    "bytea": [b"", b"x" * 32, b"a", b"b", b"c"], "timestamptz": [None] * 5,
}  # fmt: skip


@pytest.mark.parametrize("name", APPLICATION_SQL)
async def test_application_sql_says_the_same(sessions, twins, name):
    statement = APPLICATION_SQL[name]
    shapes = []
    for connection in sessions.values():
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
        heard = {
            (await said(connection, statement, *arguments)).replace(twins[twin].db_name, "this database")
            for twin, connection in sessions.items()
        }
        assert len(heard) == 1, (name, arguments, heard)


async def test_made_statements_say_the_same(twins):
    for seed, statements in shares(SEED, STATEMENTS):
        searched = await asyncio.to_thread(search, twins, seed, statements)
        assert searched.found is None, str(searched)


async def test_searches_in_other_processes_share_the_statements(twins):
    """As `python -m tests.isolation` does for the million that `make chaos-long` asks."""
    found = await asyncio.to_thread(lambda: list(searches([twins], SEED + 2, SEARCHED_MAX // 100)))
    assert [(each.seed, each.statements, each.found) for each in found] == [(SEED + 2, SEARCHED_MAX // 100, None)]
    assert shares(5, 2 * SEARCHED_MAX + 1) == [(5, SEARCHED_MAX), (6, SEARCHED_MAX), (7, 1)]


HOLES = {
    "a table without row-level security": r"ALTER TABLE jobs DISABLE ROW LEVEL SECURITY",
    "policies that let everybody pass": r"ALTER POLICY \w+ ON webhooks USING \(true\) .*; .*\(true\)",
    "a view with its owner's eyes": r"ALTER VIEW accepted_reports SET \(security_invoker = false\)",
    "a key without the tenant": r"ALTER TABLE users DROP .*; ALTER TABLE users ADD UNIQUE \(email\)",
}


@pytest.mark.parametrize("hole", HOLES)
async def test_a_hole_is_found_by_made_statements(twins, hole):
    async with owner_of(twins["much"]) as owner:
        (sql,) = [mutant.sql for mutant in await mutants(owner) if re.fullmatch(HOLES[hole], mutant.sql)]
    async with weakened(twins, sql) as weak:
        searched = await asyncio.to_thread(search, weak, 0)
    assert searched.found is not None
    assert len(searched.found.statement) < 300, "it is not shrunk"
    assert f"--statements {SEARCHED_MAX} --seed 0" in str(searched)


async def test_made_statements_are_worth_comparing(sessions):
    """Neither silence nor refusals alone would prove anything; and B would be told other things."""
    much = sessions["much"]
    tables = await readable(much)
    statements = [statement_of(tables, program) for program in some_programs(SEED, 1_000)]
    assert len(set(statements)) > 900
    heard = await answers(much, statements)
    failed = sum(answer.startswith("ERROR") for answer in heard)
    assert 50 < failed < 800
    assert sum(bool(answer) and not answer.startswith("ERROR") for answer in heard) > 100
    await much.execute(f"SET LOCAL app.tenant_id = '{B}'")
    of_b = await answers(much, statements)
    assert sum(map(leaks, statements, of_b)) > 10
    assert sum(one != other for one, other in zip(heard, of_b, strict=True)) > 200


async def test_cursors_and_copy_say_the_same(sessions):
    tables = await readable(sessions["much"])
    for program in some_programs(SEED + 1, 100):
        statement = Maker(tables, program).plain()
        if await differing(sessions, [statement]):
            continue  # which error comes first; the test above looks into that
        assert len({await by_cursor(connection, statement) for connection in sessions.values()}) == 1, statement
        assert len({await by_copy(connection, statement) for connection in sessions.values()}) == 1, statement


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
