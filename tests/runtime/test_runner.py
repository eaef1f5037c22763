"""A fold's runner against a consumer that is slow at the wrong moment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import aiokafka
from aiokafka.structs import TopicPartition

from settler_streams.runtime.batch import Batch
from settler_streams.runtime.runner import FoldRunner
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.step import Records
from settler_streams.runtime.transport import Consumer

TP = TopicPartition("input", 0)


class Opened:
    """A session that stands at an offset."""

    logic = None
    taken = True

    def __init__(self) -> None:
        self.positions = {TP: 7}
        self.state = Overlay()

    async def open(self) -> None: ...

    def new_step(self, _records: Records) -> Any:
        raise AssertionError("no agent is at work here")

    async def close(self) -> None: ...


class SlowToSeek:
    """A consumer whose first seek is answered after a rebalance, which has put its position elsewhere."""

    def __init__(self) -> None:
        self.seeking = asyncio.Event()
        self.answer = asyncio.Event()
        self.at: int | None = None

    async def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        self.at = positions[TP]
        self.seeking.set()
        await self.answer.wait()

    async def is_assigned(self, _partition: int) -> bool:
        return True

    async def fetch(self, _tps: frozenset[TopicPartition], _wait_s: float) -> Records:
        await asyncio.sleep(0)
        return {TP: [SimpleNamespace(offset=self.at)]}


async def test_a_rebalance_during_the_seek_positions_the_fold_anew() -> None:
    source, delivered = SlowToSeek(), asyncio.Queue[Batch]()
    runner = FoldRunner(0, Opened(), source, delivered.put)
    task = asyncio.create_task(runner.run())
    runner.resume()
    await source.seeking.wait()
    await runner.pause()
    source.at = 99  # the new assignment begins where the consumer believes
    runner.resume()
    source.answer.set()
    batch = await delivered.get()
    task.cancel()
    await asyncio.wait([task])
    ((record,),) = batch._records.values()
    assert record.offset == 7


async def test_a_fetch_that_outlasts_its_assignment_does_no_harm() -> None:
    """It has waited on partitions that have gone to another member meanwhile."""
    consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers="localhost:1")
    consumer.assign([TopicPartition("input", 1)])
    app = SimpleNamespace(app=SimpleNamespace(role="test"))
    Consumer._observe_lag(app, consumer, frozenset({TP}), {})  # type: ignore[arg-type]
