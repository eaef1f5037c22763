"""The watchdog: ends what stands still while work waits, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import pytest_asyncio
from aiokafka.structs import TopicPartition

from settler_streams.errors import StalledError, UnavailableError
from settler_streams.runtime import transport, watchdog
from settler_streams.runtime.app import Batches
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.runner import FoldRunner
from settler_streams.runtime.session import Session
from settler_streams.runtime.watchdog import CHECKS_MAX, Standing, Watchdog
from settler_streams.settings import Settings
from settler_streams.workers import run as worker_process
from settler_streams.workers.run import EXIT_OK, EXIT_STALLED, run
from tests.runtime import counter
from tests.runtime.apps import running
from tests.runtime.counter import PARTITIONS, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog
from tests.runtime.members import Worker, idle, last_folded, signals_restored
from tests.services.interface import Service


class Watched:
    """An app whose standings a test sets."""

    role = "counter"

    def __init__(self) -> None:
        self.now: Mapping[int, Standing] | None = {}

    async def standings(self) -> Mapping[int, Standing]:
        if self.now is None:
            raise UnavailableError("no answer")
        return self.now

    def fail(self, reason: BaseException) -> None:
        raise reason


async def test_a_fold_that_stands_still_while_records_wait_stalls() -> None:
    app = Watched()
    dog = Watchdog(app)
    app.now = {0: Standing((1, 5), waits=True), 1: Standing((1, 9), waits=False)}
    assert [await dog.check() for _ in range(CHECKS_MAX)] == [None] * CHECKS_MAX
    stalled = await dog.check()
    assert isinstance(stalled, StalledError)
    assert "partition 0" in str(stalled)


async def test_an_idle_fold_never_stalls_nor_does_one_that_moves() -> None:
    app = Watched()
    dog = Watchdog(app)
    for number in range(5 * CHECKS_MAX):
        moved = number // (CHECKS_MAX - 1)
        app.now = {0: Standing((1, 5), waits=False), 1: Standing((1, moved), waits=True)}
        assert await dog.check() is None


async def test_a_fold_that_has_gone_to_another_worker_is_forgotten() -> None:
    app = Watched()
    dog = Watchdog(app)
    for _ in range(3):
        for _ in range(CHECKS_MAX):
            app.now = {0: Standing((1, 5), waits=True)}
            assert await dog.check() is None
        app.now = {}
        assert await dog.check() is None


async def test_a_broker_that_is_gone_for_good_stalls_and_one_that_comes_back_does_not() -> None:
    app = Watched()
    dog = Watchdog(app)
    app.now = None
    for _ in range(CHECKS_MAX - 1):
        assert await dog.check() is None
    app.now = {}
    assert await dog.check() is None
    app.now = None
    for _ in range(CHECKS_MAX - 1):
        assert await dog.check() is None
    assert "Kafka has not answered" in str(await dog.check())


class Loading:
    """A session whose opening goes on and on."""

    taken = True
    positions: ClassVar[dict[TopicPartition, int]] = {}
    loaded = 0

    async def open(self) -> None:
        await asyncio.Event().wait()


async def test_an_opening_stalls_when_it_loads_nothing_and_not_while_it_loads() -> None:
    async def assigned(_partition: int) -> bool:
        return True

    async def deliver(_batch: Batch) -> None: ...

    session = Loading()
    runner = FoldRunner(0, session, assigned, deliver)  # type: ignore[arg-type]
    opening = asyncio.create_task(runner.run())
    app = Watched()
    dog = Watchdog(app)
    try:
        for number in range(5 * CHECKS_MAX):
            session.loaded = number // (CHECKS_MAX - 1)
            app.now = {0: await runner.standing()}
            assert await dog.check() is None
        checks = [await dog.check() for _ in range(CHECKS_MAX)]
    finally:
        opening.cancel()
        await asyncio.wait([opening])
    assert "partition 0" in str(checks[-1])


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


PATIENCE_S = 4.0


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that looks each second, and waits as many looks as ever."""
    monkeypatch.setattr(watchdog, "CHECK_INTERVAL_S", 1.0)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Such a watchdog waits four seconds, and a worker gives little time to what hangs.

    Opening the folds may take longer than that on a busy machine; a worker that has to live opens them before.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watchdog, "CHECKS_MAX", int(PATIENCE_S / watchdog.CHECK_INTERVAL_S))
        patched.setattr(transport, "DRAIN_DEADLINE_S", 0.5)
        patched.setattr(worker_process, "STOP_DEADLINE_S", 5.0)
        yield


@pytest.mark.services
async def test_an_agent_that_hangs_ends_the_worker(log: KafkaLog, looks_often: None) -> None:
    hangs = asyncio.Event()

    async def hanging(batches: Batches) -> None:
        async for batch in batches:
            async with batch.step():
                hangs.set()
                await asyncio.Event().wait()

    await log.append("usage-events", 2, [usage(tenant_in(2))])
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        ended = asyncio.create_task(run([Worker(log, hanging).app]))
        await hangs.wait()
        with impatient():
            assert await ended == EXIT_STALLED
    async with running([Worker(log).app]):
        await log.until("counter-journal", lambda records: last_folded(records, 2) >= 0)


@pytest.mark.services
async def test_an_opening_that_hangs_ends_the_worker(
    log: KafkaLog, looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_session: Session) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Session, "_load", never)
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        with impatient():
            assert await run([Worker(log).app]) == EXIT_STALLED


@pytest.mark.services
async def test_a_worker_that_has_nothing_to_do_is_left_alone(log: KafkaLog, looks_often: None) -> None:
    """Not even where its inputs end in records that no one ever sees: an aborted transaction and its marker."""
    async with log.producer(transactional_id=f"{log.settings.deployment}.inputs-writer") as producer:
        for partition in range(PARTITIONS):
            await producer.begin_transaction()
            key, value = usage(tenant_in(partition))
            await producer.send_and_wait(log.full("usage-events"), value, key=key, partition=partition)
            await producer.abort_transaction()
    worker = Worker(log)
    async with running([worker.app]):
        await worker.owns(lambda n: n == PARTITIONS)
        with impatient():
            await idle(worker.app, 2 * PATIENCE_S)
        (offset,) = await log.append("usage-events", 6, [usage(tenant_in(6))])
        await log.until("counter-journal", lambda records: last_folded(records, 6) >= offset)


@pytest.mark.services
async def test_an_idle_worker_notices_that_kafka_is_gone_for_good(
    log: KafkaLog, kafka: Service, looks_often: None
) -> None:
    """Nothing that it does would fail: no step, no opening, only silence."""
    worker = Worker(log)
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        ended = asyncio.create_task(run([worker.app]))
        await worker.owns(lambda n: n == PARTITIONS)
        kafka.pause()
        try:
            with impatient():
                assert await ended == EXIT_STALLED
        finally:
            kafka.resume()


@pytest.mark.services
async def test_a_worker_ends_though_something_in_it_refuses_to(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faust's services wait for their futures however often they are told to give up; the worker's log names them."""
    monkeypatch.setattr(worker_process, "STOP_DEADLINE_S", 2.0)
    over = asyncio.Event()

    async def stubborn() -> None:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()

    worker = Worker(log)
    worker.app.add_future(stubborn())
    try:
        async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
            ended = asyncio.create_task(run([worker.app]))
            await worker.owns(lambda n: n == PARTITIONS)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await ended == EXIT_OK
    finally:
        over.set()
    said = capsys.readouterr().out
    assert "worker did not stop in time" in said
    assert re.search(r"test_watchdog\.py:\d+ stubborn", said)
