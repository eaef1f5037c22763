"""A search for a statement that tells A of the others: Hypothesis draws and shrinks, the databases answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis.database import InMemoryExampleDatabase, choices_to_bytes

from tests.isolation.interference import Difference, changed_by_others, differing, excusable, readable
from tests.isolation.made_sql import BATCH, batches, programs, statement_of
from tests.isolation.twins import session

if TYPE_CHECKING:
    from settler_streams.settings import Settings

T = TypeVar("T")

SEARCHED_MAX = 10_000
"""Statements of one search, which is what one seed stands for: Hypothesis remembers all that it has drawn for it."""

_KEY = b"the statement to shrink"


class Searched(NamedTuple):
    """``excused`` statements differed by their plan alone; ``found`` differs by the others' rows, and is small."""

    seed: int
    statements: int
    excused: int
    found: Difference | None

    def __str__(self) -> str:
        return f"{self.found}\nto repeat: python -m tests.isolation --statements {self.statements} --seed {self.seed}"


def shares(seed_: int, statements: int) -> list[tuple[int, int]]:
    """``statements`` as searches: the seed of each, from ``seed_`` on, and how many it asks."""
    whole, rest = divmod(statements, SEARCHED_MAX)
    return [(seed_ + place, count) for place, count in enumerate([SEARCHED_MAX] * whole + [rest] * bool(rest))]


def search(twins: Mapping[str, Settings], seed_: int, statements: int = SEARCHED_MAX) -> Searched:
    """Ask ``twins`` the statements that ``seed_`` stands for, until one is found.

    Blocks, with an event loop of its own: for a thread or a process without one.
    """
    assert 0 < statements <= SEARCHED_MAX
    with _Search(twins) as begun:
        return begun.run(seed_, statements)


class _Search:
    def __init__(self, twins: Mapping[str, Settings]) -> None:
        self._twins = twins
        self._excused: dict[str, bytes] = {}

    def __enter__(self) -> _Search:
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self._run(self._open())
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._run(self._stack.aclose())
        finally:
            self._runner.close()

    def run(self, seed_: int, statements: int) -> Searched:
        asked = 0
        guilty: bytes | None = None

        @seed(seed_)
        @settings(
            # Of each example some statements may be equal; the first one is the simplest statement a hundred times.
            max_examples=2 + statements // BATCH * 11 // 10,
            database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(batches())
        def ask(drawn: list[bytes]) -> None:
            nonlocal asked, guilty
            if guilty is not None or asked == statements:
                return
            made = {statement_of(self._tables, program): program for program in drawn}
            texts = list(made)[: statements - asked]
            asked += len(texts)
            for difference in self._run(differing(self._sessions, texts)):
                if excusable(difference):
                    self._excused[difference.statement] = made[difference.statement]
                else:
                    guilty = made[difference.statement]

        ask()
        assert asked == statements or guilty is not None, f"{asked} statements were drawn"
        if guilty is None:
            for difference in self._run(changed_by_others(self._twins, list(self._excused))):
                guilty = self._excused[difference.statement]
        return Searched(seed_, statements, len(self._excused), None if guilty is None else self._shrunk(guilty))

    def _shrunk(self, program: bytes) -> Difference:
        """What is left of a program that is found; Hypothesis shrinks what it replays from its memory."""
        memory = InMemoryExampleDatabase()
        memory.save(_KEY, choices_to_bytes([program]))
        phases = settings(database=memory, deadline=None, phases=[Phase.reuse, Phase.shrink])
        smallest = find(
            programs(), lambda drawn: self._difference(drawn) is not None, settings=phases, database_key=_KEY
        )
        difference = self._difference(smallest)
        assert difference is not None
        return difference

    def _difference(self, program: bytes) -> Difference | None:
        statement = statement_of(self._tables, program)
        for difference in self._run(differing(self._sessions, [statement])):
            if not excusable(difference):
                return difference
            return next(iter(self._run(changed_by_others(self._twins, [statement]))), None)
        return None

    async def _open(self) -> None:
        self._sessions = {
            name: await self._stack.enter_async_context(session(twin)) for name, twin in self._twins.items()
        }
        self._tables = await readable(next(iter(self._sessions.values())))

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)
