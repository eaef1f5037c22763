"""Members of the counter's group, and what their journals say."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.events import StepJournal, decode
from settler_streams.runtime.app import BatchAgent, Batches, FoldApp
from settler_streams.runtime.session import Session
from tests.runtime import counter
from tests.runtime.counter import spec_of, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog, Record


class Worker:
    """One member of the counter's group."""

    def __init__(self, log: KafkaLog, agent: BatchAgent | None = None) -> None:
        self.sessions: dict[int, list[Session]] = {}
        self.log = log

        def new_session(partition: int) -> Session:
            session = Session(spec_of(log), partition)
            self.sessions.setdefault(partition, []).append(session)
            return session

        self.app = FoldApp(
            "counter",
            f"{log.settings.deployment}.counter",
            cluster=Cluster.of(log.settings),
            input_topics=(log.full("usage-events"),),
            partitions=counter.PARTITIONS,
            new_session=new_session,
            output_topics={log.full(f"counter-{kind}"): counter.PARTITIONS for kind in ("changelog", "journal")},
        )
        self.table = self.app.fold_table(log.full("counter-changelog"), counter.Counter.kinds)
        self.app.batch_agent(agent or count)

    async def owns(self, number: Callable[[int], bool], wait_s: float = WAIT_S_MAX) -> set[int]:
        """Wait until it owns so many open folds."""
        async with asyncio.timeout(wait_s):
            while not number(len(self.app.open_folds())):
                await asyncio.wait([self.app.failure], timeout=0.05)
                assert not self.app.failure.done(), self.app.failure.result()
        return set(self.app.open_folds())


async def shared(first: Worker, second: Worker) -> tuple[set[int], set[int]]:
    """What each of two members owns, once they have opened every fold between them.

    One that joined before the other opens its folds one by one: half of them are open for a moment then, too.
    """
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            ours, theirs = set(first.app.open_folds()), set(second.app.open_folds())
            if len(ours) == len(theirs) == counter.PARTITIONS // 2 and not ours & theirs:
                return ours, theirs
            await asyncio.wait([first.app.failure, second.app.failure], timeout=0.05)
            for app in (first.app, second.app):
                assert not app.failure.done(), app.failure.result()


async def count(batches: Batches) -> None:
    """The counter's agent."""
    async for batch in batches:
        async with batch.step() as step:
            for record in step.decode():
                outcome = step.decide(batch.logic, record)
                step.apply(outcome)
                step.publish(outcome)


@contextlib.asynccontextmanager
async def signals_restored() -> AsyncIterator[None]:
    """A worker handles SIGTERM and SIGINT of its process; afterwards the test runner does so again."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            asyncio.get_running_loop().remove_signal_handler(signum)
            signal.signal(signum, handler)


@contextlib.asynccontextmanager
async def steady_load(log: KafkaLog, sent: Counter[int]) -> AsyncIterator[None]:
    """A record to each partition, again as soon as the broker has stored the last."""
    stop = asyncio.Event()

    async def load() -> None:
        async with log.producer(enable_idempotence=True) as producer:
            while not stop.is_set():
                for partition in range(counter.PARTITIONS):
                    key, value = usage(tenant_in(partition))
                    await producer.send(log.full("usage-events"), value, key=key, partition=partition)
                    sent[partition] += 1
                await producer.flush()

    task = asyncio.create_task(load())
    try:
        yield
    finally:
        stop.set()
        await task


async def positions(log: KafkaLog) -> dict[int, int]:
    records = await log.read("counter-journal")
    return {partition: last_folded(records, partition) for partition in range(counter.PARTITIONS)}


def moved(records: list[Record], before: dict[int, int]) -> bool:
    return all(last_folded(records, partition) > offset for partition, offset in before.items())


def last_folded(records: list[Record], partition: int) -> int:
    """The last input offset that the partition's journal names."""
    for record in reversed(records):
        if record.partition == partition:
            body: Any = decode(record.value).data
            assert isinstance(body, StepJournal)
            return body.runs[-1].last
    return -1


async def idle(app: FoldApp, seconds: float) -> None:
    """Nothing arrives for a while; ends early if the worker fails."""
    await asyncio.wait([app.failure], timeout=seconds)
    assert not app.failure.done()
