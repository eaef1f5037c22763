"""A fold's runner: what it has fetched is processed once, whatever a rebalance does meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from aiokafka.structs import TopicPartition

from settler_streams.runtime import runner as runner_module
from settler_streams.runtime.batch import ORDINARY_BYTES, Batch
from settler_streams.runtime.runner import FoldRunner
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.step import Records
from settler_streams.runtime.transport import Consumer
from settler_streams.runtime.turns import LARGE_RECORDS

TP = TopicPartition("input", 0)


class Fetching:
    """A session whose fetches a test answers."""

    logic = None
    taken = True

    def __init__(self) -> None:
        self.positions = {TP: 7}
        self.loaded = 0
        self.state = Overlay()
        self.opens = 0
        self.answers: asyncio.Queue[Records] = asyncio.Queue()
        self.stepped: list[Records] = []

    async def open(self) -> None:
        self.opens += 1

    async def fetch(self, _wait_s: float) -> Records:
        return await self.answers.get()

    async def backlog(self) -> tuple[list[int], bool]:
        return [7], True

    @asynccontextmanager
    async def new_step(self, records: Records) -> AsyncIterator[None]:
        yield
        self.stepped.append(records)

    async def close(self) -> None: ...


def record(offset: int, value: bytes | None = b"v") -> SimpleNamespace:
    return SimpleNamespace(offset=offset, value=value)


def records(offset: int) -> Any:
    return {TP: [record(offset)]}


@asynccontextmanager
async def at_work(
    session: Fetching, assigned: Any = None, gather_s: float = 0.0
) -> AsyncIterator[tuple[FoldRunner, asyncio.Queue[Batch]]]:
    """A runner, and the batches that it hands over."""

    async def yes(_partition: int) -> bool:
        return True

    delivered: asyncio.Queue[Batch] = asyncio.Queue()
    runner = FoldRunner(0, session, assigned or yes, delivered.put, gather_s)
    task = asyncio.create_task(runner.run())
    try:
        yield runner, delivered
    finally:
        task.cancel()
        await asyncio.wait([task])


async def process(batch: Batch) -> None:
    async with batch.step():
        pass


async def test_a_batch_that_a_rebalance_takes_back_is_handed_over_again_and_before_any_other() -> None:
    session = Fetching()
    async with at_work(session) as (runner, delivered):
        runner.resume()
        session.answers.put_nowait(records(7))
        session.answers.put_nowait(records(8))
        first = await delivered.get()
        await runner.pause()
        await process(first)  # Faust may have had it under way to the agent
        assert session.stepped == []
        runner.resume()
        for _ in range(2):
            await process(await delivered.get())
        assert session.stepped == [records(7), records(8)]
        assert session.opens == 1


async def test_what_arrives_during_a_rebalance_waits_for_its_end() -> None:
    session = Fetching()
    async with at_work(session) as (runner, delivered):
        runner.resume()
        await settled()
        await runner.pause()
        session.answers.put_nowait(records(7))
        await settled()
        assert delivered.empty()
        runner.resume()
        await process(await delivered.get())
        assert session.stepped == [records(7)]


async def test_a_pause_waits_for_the_step_under_way() -> None:
    session = Fetching()
    async with at_work(session) as (runner, delivered):
        runner.resume()
        session.answers.put_nowait(records(7))
        batch = await delivered.get()
        async with batch.step():
            pausing = asyncio.create_task(runner.pause())
            await settled()
            assert not pausing.done()
        await pausing
        assert session.stepped == [records(7)]


async def test_a_small_batch_waits_for_more_and_what_waits_is_not_lost() -> None:
    session = Fetching()
    async with at_work(session, gather_s=0.5) as (runner, delivered):
        runner.resume()
        session.answers.put_nowait(records(7))
        await settled()
        assert delivered.empty()
        await runner.pause()  # nothing is under way
        runner.resume()
        await process(await delivered.get())
        assert session.stepped == [records(7)]


async def test_a_large_batch_waits_for_nothing() -> None:
    session, large = Fetching(), {TP: [record(offset) for offset in range(LARGE_RECORDS)]}
    async with at_work(session, gather_s=3600) as (runner, delivered):
        runner.resume()
        session.answers.put_nowait(large)
        await process(await delivered.get())
        assert session.stepped == [large]


async def test_a_batch_weighs_what_its_records_hold_and_never_less_than_one_each() -> None:
    """A step of admission lets all its jobs into the pool in few records."""
    many = [record(offset, None) for offset in range(5)]
    assert Batch(Fetching(), 0, {TP: many}).weight == 5
    assert Batch(Fetching(), 0, {TP: [record(7, bytes(ORDINARY_BYTES * LARGE_RECORDS))]}).weight == LARGE_RECORDS


async def test_a_fold_that_has_been_assigned_to_another_is_not_opened(monkeypatch: Any) -> None:
    """Opening would fence its rightful owner."""
    monkeypatch.setattr(runner_module, "ASSIGNED_RETRY_S", 0)
    session, asked, ours = Fetching(), asyncio.Event(), [False] * 3

    async def assigned(_partition: int) -> bool:
        assert session.opens == 0
        asked.set()
        return ours.pop(0) if ours else True

    async with at_work(session, assigned) as (runner, _):
        await asked.wait()
        assert (session.opens, runner.opened) == (0, False)
        assert (await runner.standing()).waits, "the watchdog sees that it does not get anywhere"
        async with asyncio.timeout(5):
            while not runner.opened:
                await settled()
        assert (session.opens, ours) == (1, [])


async def settled() -> None:
    """Let everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_batch_whose_fold_is_dropped_before_its_step_has_begun_is_not_processed() -> None:
    """The end of a rebalance may let the flow go on between a stop's pause and the drop."""
    session = Fetching()
    async with at_work(session) as (runner, delivered):
        runner.resume()
        await session.answers.put(records(7))
        batch = await delivered.get()
        app = SimpleNamespace(role="counter", input_topics=("input",))
        driver: Any = SimpleNamespace(_runners={0: runner}, _tasks={}, app=app)
        await Consumer._drop(driver, 0)
        await process(batch)
    assert session.stepped == []
