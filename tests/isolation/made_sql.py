"""Statements that Hypothesis draws over the columns that the services' login can read.

A statement is made from a program, a row of bytes of which each answers one question: which form, which table, which
column. Behind the program's end every answer is the first, so a shorter program is a simpler statement, and Hypothesis
shrinks one as it shrinks any bytes. (A draw for each question gives the same and takes ten times as long as all else.)

Left out, because their answers differ legitimately: now() and random values; xmin, ctid and the like, which tell where
and in which order rows were stored; LIMIT and window frames without a total order; of EXPLAIN, the shape of the plan,
which follows from how large a table is for everybody; errors inside INTERSECT and
EXCEPT, and FULL JOIN, for the same reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from hypothesis import strategies as st

from tests.isolation.probe import A, B
from tests.isolation.twins import MARK, row_id_of

T = TypeVar("T")

NUMBERS = {"integer", "bigint"}
PROGRAM_BYTES = 64
"""Of seven hundred statements one would ask more questions; it ends in simple expressions."""
BATCH = 100
"""Statements in one example: 6,400 bytes of the 8,192 that Hypothesis draws for one."""


class Table(NamedTuple):
    """``columns`` maps each column to its type."""

    name: str
    columns: dict[str, str]
    is_view: bool


@st.composite
def batches(draw: st.DrawFn) -> list[bytes]:
    """Programs of ``BATCH`` statements, in one draw: Hypothesis repeats parts of an example that look alike."""
    drawn = draw(st.binary(min_size=BATCH * PROGRAM_BYTES, max_size=BATCH * PROGRAM_BYTES))
    return [drawn[begun : begun + PROGRAM_BYTES] for begun in range(0, len(drawn), PROGRAM_BYTES)]


def programs() -> st.SearchStrategy[bytes]:
    """The program of one statement, of any length, which shrinks."""
    return st.binary(max_size=PROGRAM_BYTES)


def some_programs(seed: int, count: int) -> list[bytes]:
    """Programs without Hypothesis, for what is to be looked at rather than searched."""
    drawn = random.Random(seed)  # noqa: S311 - made to be repeated
    return [drawn.randbytes(PROGRAM_BYTES) for _ in range(count)]


def statement_of(tables: Sequence[Table], program: bytes) -> str:
    """The statement that ``program`` makes over ``tables``; the same for the same arguments."""
    return Maker(tables, program).statement()


class Maker:
    """Makes one statement. ``depth`` bounds how far expressions nest."""

    def __init__(self, tables: Sequence[Table], program: bytes) -> None:
        self.tables = tables
        self.answers = iter(program)
        self.aliases = 0

    def below(self, end: int) -> int:
        """The next answer, from 0 to ``end`` - 1 (at most 256)."""
        return next(self.answers, 0) % end

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def one(self, *choices: Callable[[], str]) -> str:
        return self.choice(choices)()

    def source(self, tables: Sequence[Table] = ()) -> tuple[str, Table]:
        self.aliases += 1
        return f"t{self.aliases}", self.choice(tables or self.tables)

    def column(self, scope, types) -> str | None:
        found = [f"{a}.{c}" for a, t in scope for c, kind in t.columns.items() if kind in types]
        return self.choice(found) if found else None

    def number(self, scope, depth=2) -> str:
        column = self.column(scope, NUMBERS) or "3"
        literal = str(self.choice([0, 1, 2, 3, 60, -1, 2**31, 2**62]))
        if depth == 0:
            return self.choice([column, literal])
        return self.one(
            lambda: column,
            lambda: literal,
            lambda: f"(1 / ({self.number(scope, depth - 1)} - {self.below(3)}))",
            lambda: f"({self.number(scope, depth - 1)} {self.choice('+-*/%')} {self.number(scope, depth - 1)})",
            lambda: f"length({self.text(scope, depth - 1)})",
            lambda: f"({self.text(scope, depth - 1)})::{self.choice(['integer', 'bigint'])}",
            lambda: f"coalesce({column}, {literal})",
            lambda: f"CASE WHEN {self.truth(scope, depth - 1)} THEN {literal} ELSE {column} END",
            lambda: f"(SELECT {self.aggregate(inner := [self.source()], depth - 1)} FROM {self.named(inner[0])})",
            lambda: f"sqrt({self.number(scope, depth - 1)})::bigint",
        )

    def text(self, scope, depth=2) -> str:
        column = self.column(scope, {"text"}) or "'x'"
        if depth == 0:
            return column
        return self.one(
            lambda: column,
            lambda: f"'{self.choice(['a0@b', 'zqmuch0@b', 'free', '1', '', '('])}'",
            lambda: f"({self.number(scope, depth - 1)})::text",
            lambda: f"{self.column(scope, {'uuid'})}::text",
            lambda: f"({self.text(scope, depth - 1)} || {self.text(scope, depth - 1)})",
            lambda: f"upper({self.text(scope, depth - 1)})",
            lambda: f"left({self.text(scope, depth - 1)}, {self.below(12) - 3})",
            lambda: f"md5({self.text(scope, depth - 1)})",
            lambda: f"split_part({self.text(scope, depth - 1)}, '@', {self.below(3)})",
            lambda: f"(({self.text(scope, depth - 1)})::jsonb)::text",
            lambda: f"(({self.text(scope, depth - 1)})::uuid)::text",
            lambda: f"(({self.text(scope, depth - 1)})::date)::text",
        )

    def truth(self, scope, depth=2) -> str:
        uuid_column = self.column(scope, {"uuid"})
        if depth == 0:
            return f"{uuid_column} {self.choice(['=', '<>'])} '{self.choice([A, B])}'"
        return self.one(
            lambda: self.truth(scope, 0),
            lambda: (
                f"{self.number(scope, depth - 1)} {self.choice(['<', '=', '>=', '<>'])} {self.number(scope, depth - 1)}"
            ),
            lambda: (
                f"{self.text(scope, depth - 1)} {self.choice(['=', '~', 'LIKE', '<'])} {self.text(scope, depth - 1)}"
            ),
            lambda: f"({self.truth(scope, depth - 1)} {self.choice(['AND', 'OR'])} {self.truth(scope, depth - 1)})",
            lambda: f"NOT ({self.truth(scope, depth - 1)})",
            lambda: f"{self.text(scope, depth - 1)} IS NULL",
            lambda: (
                f"EXISTS (SELECT FROM {self.named(inner := self.source())} WHERE "
                f"{self.truth([*scope, inner], depth - 1)})"
            ),
            lambda: (
                f"{uuid_column} {self.choice(['IN', 'NOT IN'])} (SELECT "
                f"{self.column([inner := self.source()], {'uuid'})} FROM {self.named(inner)})"
            ),
        )

    def aggregate(self, scope, depth=1) -> str:
        return self.one(
            lambda: "count(*)",
            lambda: f"max({self.number(scope, depth)})",
            lambda: f"min(length({self.text(scope, depth)}))",
            lambda: f"count(DISTINCT {self.text(scope, depth)})",
            lambda: f"count(*) FILTER (WHERE {self.truth(scope, depth)})",
        )

    def named(self, source) -> str:
        return f"{source[1].name} AS {source[0]}"

    def outputs(self, scope) -> str:
        made = (self.one(lambda: self.number(scope), lambda: self.text(scope)) for _ in range(1 + self.below(3)))
        return ", ".join(made)

    def plain(self) -> str:
        scope = [self.source()]
        return f"SELECT {self.outputs(scope)} FROM {self.named(scope[0])} WHERE {self.truth(scope)}"

    def joined(self) -> str:
        left, right = self.source(), self.source()
        kind = self.choice(["JOIN", "LEFT JOIN"])
        on = f"{self.column([left], {'uuid'})} = {self.column([right], {'uuid'})}"
        scope = [left, right]
        return (
            f"SELECT {self.outputs(scope)} FROM {self.named(left)} {kind} {self.named(right)} ON {on} "
            f"WHERE {self.truth(scope)}"
        )

    def grouped(self) -> str:
        scope = [self.source()]
        key = self.text(scope, 1)
        return (
            f"SELECT {key}, {self.aggregate(scope)} FROM {self.named(scope[0])} WHERE {self.truth(scope, 1)} "
            f"GROUP BY {key} HAVING {self.aggregate(scope)} > {self.below(2)}"
        )

    def set_operation(self) -> str:
        one, two = [self.source()], [self.source()]
        if self.below(2):
            # Which side is read first, and so whether the other is read at all, follows from how large they are.
            return (
                f"SELECT {self.text(one, 0)} FROM {self.named(one[0])} {self.choice(['INTERSECT', 'EXCEPT'])} "
                f"SELECT {self.text(two, 0)} FROM {self.named(two[0])} WHERE {self.truth(two, 0)}"
            )
        operator = self.choice(["UNION", "UNION ALL"])
        return (
            f"SELECT {self.text(one)} FROM {self.named(one[0])} {operator} "
            f"SELECT {self.text(two)} FROM {self.named(two[0])} WHERE {self.truth(two, 1)}"
        )

    def with_query(self) -> str:
        kept = self.choice(["", "MATERIALIZED", "NOT MATERIALIZED"])
        inner, scope = [self.source()], [self.source()]
        return (
            f"WITH w (v) AS {kept} (SELECT {self.text(inner)} FROM {self.named(inner[0])} "
            f"WHERE {self.truth(inner, 1)}) "
            f"SELECT {self.outputs(scope)}, (SELECT count(*) FROM w) FROM {self.named(scope[0])} "
            f"WHERE {self.text(scope)} IN (SELECT v FROM w)"
        )

    def windowed(self) -> str:
        scope = [self.source()]
        call = self.choice(["count(*)", "rank()", "dense_rank()", f"max({self.number(scope, 1)})"])
        window = f"PARTITION BY {self.text(scope, 1)} ORDER BY {self.number(scope, 1)}"
        return f"SELECT {call} OVER ({window}) FROM {self.named(scope[0])}"

    def written(self) -> str:
        alias, table = self.source([table for table in self.tables if not table.is_view])
        scope = [(alias, table)]
        texts = [name for name, kind in table.columns.items() if kind == "text"] or ["tenant_id"]
        names = ", ".join(table.columns)
        own = "id" if table.name == "tenants" else "tenant_id"
        taken = f"SELECT {names} FROM {table.name} AS {alias} WHERE {self.truth(scope, 1)}"
        given = ", ".join(f"'{B}'::uuid" if name == own else name for name in table.columns)
        back = f"RETURNING {self.text([(table.name, table)], 1)}"
        return self.one(
            lambda: (
                f"UPDATE {table.name} AS {alias} SET {self.choice(texts)} = {self.text(scope)} "
                f"WHERE {self.truth(scope)} RETURNING {self.outputs(scope)}"
            ),
            lambda: f"UPDATE {table.name} SET {own} = '{B}' {back}",
            lambda: f"DELETE FROM {table.name} AS {alias} WHERE {self.truth(scope)} RETURNING {self.outputs(scope)}",
            lambda: f"INSERT INTO {table.name} ({names}) {taken} {back}",
            lambda: (
                f"INSERT INTO {table.name} ({names}) SELECT {given} FROM {table.name} ON CONFLICT DO NOTHING {back}"
            ),
            lambda: f"INSERT INTO {table.name} ({names}) {taken} ON CONFLICT DO NOTHING {back}",
            lambda: (
                f"MERGE INTO {table.name} AS {alias} USING tenants AS x ON {alias}.{own} = x.id AND "
                f"{self.truth(scope, 1)} WHEN MATCHED THEN DELETE RETURNING {self.outputs(scope)}"
            ),
            lambda: f"SELECT {self.outputs(scope)} FROM {table.name} AS {alias} WHERE {self.truth(scope)} FOR UPDATE",
        )

    def taken(self) -> str:
        """One of A's rows is given a value that B has: a key without the tenant would say that it is taken."""
        _, table = self.source([table for table in self.tables if not table.is_view])
        values = {
            "uuid": f"'{row_id_of(B, 0)}' WHERE %s = '{row_id_of(A, 0)}'",
            "text": f"'{MARK}much' || substr(%s, 2) WHERE %s LIKE 'a0%'",
        }
        column = self.choice([name for name, kind in table.columns.items() if kind in values])
        return f"UPDATE {table.name} SET {column} = {values[table.columns[column]].replace('%s', column)}"

    def statement(self) -> str:
        forms = (
            self.plain,
            self.joined,
            self.grouped,
            self.set_operation,
            self.with_query,
            self.windowed,
            self.written,
        )
        made = self.choice([*forms, self.joined, self.written, self.taken])()
        return f"EXPLAIN (COSTS OFF) {made}" if self.below(25) == 24 else made
