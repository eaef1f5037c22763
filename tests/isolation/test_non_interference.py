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
from typing import get_args

import asyncpg
import msgspec
import pytest

from settler_streams.adapters.postgres import queries as adapter_queries
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.services import queries as service_queries
from settler_streams.services.webhooks import queries as webhook_queries
from tests.adapters.postgres.conftest import owner_of
from tests.isolation.interference import differing, leaks, readable
from tests.isolation.made_batches import REFUSED, C, Names, after, batch_of, effects
from tests.isolation.made_sql import Maker, some_programs, statement_of
from tests.isolation.many_searches import searches
from tests.isolation.probe import A, B
from tests.isolation.search import SEARCHED_MAX, search, shares
from tests.isolation.twins import MARK, answers, make_twins, row_id_of, said, session, weakened
from tests.isolation.weakenings import mutants
from tests.source_code import parsed

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
        for node in ast.walk(parsed(path))
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


KINDS = list(REFUSED)


def test_every_kind_of_effect_is_in_the_batches():
    assert set(KINDS) == {each.KIND for each in get_args(Effect)}


async def names_of(connection, tenant_id: str, number: int) -> Names:
    """As ROWS makes them for the tenant's row of that number."""
    row_id = row_id_of(tenant_id, number)
    return Names(row_id, await connection.fetchval("SELECT hashtext($1)::bigint & 65535", row_id))


async def effects_by_twin(connection, keys: str) -> dict[str, list]:
    """A's effects, and with them nobody's, a few of B, or many of B and of one who stands before A."""
    of_a, of_b = [await names_of(connection, tenant, 100 if keys == "new" else 0) for tenant in (A, B)]
    if keys == "crossed":
        of_a, of_b = of_b, of_a
    mine = effects(A, of_a, "a", 10)
    few = [effects(B, of_b, f"{MARK}few", 3)]
    many = [effects(tenant, of_b, f"{MARK}many", version) for tenant in (C, B) for version in (5, 2**40)]
    return {"nothing": [mine], "little": [*few, mine], "much": [mine, *many]}


async def heard(sessions, given, kinds, apart=lambda _: ()):
    """What the recorder was told of its batch and A sees afterwards, in each of the twins."""
    return [
        await after(connection, batch_of(given[twin], kinds), apart=apart(twin))
        for twin, connection in sessions.items()
    ]


@pytest.mark.parametrize("keys", ["new", "again", "crossed"])
async def test_a_batch_of_the_recorder_says_the_same(sessions, keys):
    """Whatever other tenants' effects are in it, and whatever rows they meet."""
    given = await effects_by_twin(sessions["much"], keys)
    before, before_of_b = [await after(sessions["much"], "{}", seen_by=tenant) for tenant in (A, B)]
    for kinds in [[kind] for kind in KINDS] + [KINDS]:
        nothing, little, much = await heard(sessions, given, kinds)
        assert nothing == little == much, kinds
        assert nothing.told == "written"
        assert not any(MARK in rows for rows in nothing.seen), kinds
        # A batch that changed nothing of either would prove nothing; an entry that is there stays as it is.
        changes = keys != "again" or kinds not in (["audit_entry"], ["dead_letter"])
        assert (nothing.seen != before.seen) == changes, kinds
        of_b = await after(sessions["much"], batch_of(given["much"], kinds), seen_by=B)
        assert (of_b.seen != before_of_b.seen) == changes, kinds


@pytest.mark.parametrize("apart", [[A], [B], [A, B]])
async def test_a_batch_says_the_same_wherever_each_tenants_tables_are(sessions, apart):
    given = await effects_by_twin(sessions["much"], "crossed")
    nothing, little, much = await heard(
        sessions, given, KINDS, lambda twin: [each for each in apart if each == A or twin != "nothing"]
    )
    assert nothing == little == much
    assert nothing.told == "written"
    assert not any(MARK in rows for rows in nothing.seen)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_effect_is_refused_in_the_same_words(sessions, kind):
    before = await after(sessions["much"], "{}")
    for keys in ("new", "again", "crossed"):
        given = await effects_by_twin(sessions["much"], keys)
        (mine,) = given["nothing"]
        bad = {**mine, kind: msgspec.structs.replace(mine[kind], **REFUSED[kind])}
        given = {twin: [bad if each is mine else each for each in batch] for twin, batch in given.items()}
        for kinds in ([kind], KINDS):
            nothing, little, much = await heard(sessions, given, kinds)
            assert nothing == little == much, (keys, kinds)
            assert nothing.told.startswith("ERROR")
            assert MARK not in nothing.told
            assert nothing.seen == before.seen


@pytest.mark.parametrize("kind", KINDS)
async def test_an_effect_of_another_tenant_that_is_refused_changes_nothing(sessions, kind):
    before = await after(sessions["much"], "{}")
    given = await effects_by_twin(sessions["much"], "crossed")
    for twin in ("little", "much"):
        theirs = [each for each in given[twin] if each[kind].tenant_id != A]
        bad = {**theirs[-1], kind: msgspec.structs.replace(theirs[-1][kind], **REFUSED[kind])}
        found = await after(sessions[twin], batch_of([*given["nothing"], *theirs[:-1], bad], KINDS))
        assert found.told.startswith("ERROR")
        assert found.seen == before.seen


HOLES_OF_BATCHES = {
    "a key without the tenant": "CREATE UNIQUE INDEX ON jobs (job_id)",
    "effects that go to all tenants of a batch": """
    CREATE OR REPLACE FUNCTION by_tenant(batch jsonb, kind text) RETURNS TABLE (tenant uuid, effects jsonb)
    LANGUAGE sql IMMUTABLE
    BEGIN ATOMIC
        SELECT a.key::uuid, b.value -> kind FROM jsonb_each(batch) AS a, jsonb_each(batch) AS b;
    END
    """,
}


@pytest.mark.parametrize("hole", HOLES_OF_BATCHES)
async def test_a_hole_is_found_by_batches(twins, hole):
    async with weakened(twins, HOLES_OF_BATCHES[hole]) as weak, contextlib.AsyncExitStack() as stack:
        sessions = {name: await stack.enter_async_context(session(twin)) for name, twin in weak.items()}
        given = await effects_by_twin(sessions["much"], "crossed")
        nothing, little, much = await heard(sessions, given, KINDS)
    assert nothing != little
    assert nothing != much


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
