"""Worker processes: one is killed, another asked to stop, and still every request is decided exactly once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from settler_streams.events import JobDecided, OffsetRun, StepJournal, decode
from settler_streams.signals import EXIT_FORCED
from settler_streams.topology import load_topology
from tests.runtime.counter import tenant_in
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog, Record
from tests.runtime.requests import event_bytes, job_request, new_id, register

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

pytestmark = [pytest.mark.services, pytest.mark.slow]

PARTITIONS = load_topology().tenant_partitions
BURST = 20
"""Requests of each tenant at a time."""
DRIP = 4
"""The same where they come without a pause."""
DRAIN_S_MAX = 30.0
"""From the signal to the end of the process."""


@pytest.fixture(scope="module")
def settings(services: Services, kafka: Service, deployment: str) -> Settings:
    """Admission needs no database."""
    return services.settings.model_copy(update={"deployment": deployment})


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The topics as published, and a tenant in each partition."""
    log = KafkaLog(settings, load_topology())
    await log.create()
    for partition in range(PARTITIONS):
        await register(log, tenant_in(partition), partition)
    return log


async def test_kill_restart_takeover_and_sigterm_decide_every_request_once(settings: Settings, log: KafkaLog) -> None:
    """
    1. A works alone and is killed in mid-load.
    2. B starts while the group still counts A as a member, and takes over when A's session has timed out.
    3. C joins; B is told to stop in mid-load and leaves in order, and C takes over at once.
    """
    async with AsyncExitStack() as stack:
        sent = [await burst(log) for _ in range(2)]
        a = await stack.enter_async_context(worker(settings))
        await log.until("job-decisions", lambda records: len(records) >= BURST)
        sent.append(await burst(log))
        a.tell(signal.SIGKILL)
        await a.ends(DRAIN_S_MAX)

        b = await stack.enter_async_context(worker(settings))
        sent.append(await burst(log))
        await decided_all(log, ids(sent))

        c = await stack.enter_async_context(worker(settings))
        sent.append(await burst(log))
        b.tell(signal.SIGTERM)
        sent.append(await burst(log))
        assert await b.ends(DRAIN_S_MAX) == 0
        sent.append(await burst(log))
        await decided_all(log, ids(sent))
        c.tell(signal.SIGTERM)
        assert await c.ends(DRAIN_S_MAX) == 0

    decisions = decided(await log.read("job-decisions"))
    assert decisions.keys() == ids(sent)
    assert {job: times for job, times in decisions.items() if times != 1} == {}
    assert await log.read("dead-letters") == []
    assert repeated_steps(await log.read("admission-journal")) == []


async def test_a_worker_that_is_told_to_stop_in_mid_load_leaves_nothing_to_repeat(
    settings: Settings, log: KafkaLog
) -> None:
    """Three workers follow each other, each told to stop while requests come without a pause, and go on coming."""
    sent: list[list[str]] = []
    for _ in range(3):
        async with worker(settings) as process:
            await process.said("worker ready")
            before = len(await log.read("job-decisions"))
            async with load(log, sent):
                await log.until("job-decisions", lambda records, n=before: len(records) >= n + 10 * BURST, wait_s=90)
                process.tell(signal.SIGTERM)
                assert await process.ends(DRAIN_S_MAX) == 0
    async with worker(settings):
        await decided_all(log, ids(sent))
    decisions = decided(await log.read("job-decisions"))
    assert {job: decisions[job] for job in ids(sent) if decisions[job] != 1} == {}
    assert repeated_steps(await log.read("admission-journal")) == []


async def test_a_signal_ends_a_start_that_gets_no_answer(settings: Settings, log: KafkaLog, kafka: Service) -> None:
    kafka.pause()
    try:
        async with worker(settings) as process:
            await process.said("worker starting")
            process.tell(signal.SIGTERM)
            assert await process.ends(DRAIN_S_MAX) == 0
    finally:
        kafka.resume()


async def test_a_second_signal_ends_the_worker_at_once(settings: Settings, log: KafkaLog, kafka: Service) -> None:
    """The first finds a step that waits for a broker which does not answer, so the drain would take its ten seconds."""
    async with worker(settings) as process:
        await process.said("worker ready")
        sent = await burst(log)
        await decided_all(log, set(sent))
        kafka.pause()
        try:
            process.tell(signal.SIGTERM)
            await process.said("stopping")
            process.tell(signal.SIGINT)
            assert await process.ends(8) == EXIT_FORCED
        finally:
            kafka.resume()


class Worker:
    """A worker process of the admission role, whose log is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""
        self._news = asyncio.Event()
        self._ended = False
        self._reading = asyncio.create_task(self._read())

    def tell(self, signum: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(signum)

    async def said(self, words: str) -> None:
        """Wait until it has logged ``words``."""
        async with asyncio.timeout(WAIT_S_MAX):
            while words not in self.log:
                assert not self._ended, f"ended without saying {words!r}: {self.log[-2000:]}"
                self._news.clear()
                await self._news.wait()

    async def ends(self, within_s: float) -> int:
        """Its exit code."""
        return await asyncio.wait_for(self.process.wait(), within_s)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            self.log += line.decode()
            self._news.set()
        self._ended = True
        self._news.set()


@asynccontextmanager
async def worker(settings: Settings) -> AsyncIterator[Worker]:
    """Killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "settler_streams.cli.main", "worker", "--roles", "admission",
        env={**os.environ, **settings.environment()},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, limit=2**20,
    )  # fmt: skip
    try:
        yield Worker(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def load(log: KafkaLog, sent: list[list[str]]) -> AsyncIterator[None]:
    """Requests without a pause, meanwhile; their ids are added to ``sent``."""
    stop = asyncio.Event()

    async def send() -> None:
        while not stop.is_set():
            sent.append(await burst(log, DRIP))

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        stop.set()
        await sending


async def burst(log: KafkaLog, of_each: int = BURST) -> list[str]:
    """So many requests of every tenant; returns their ids."""
    sent: list[str] = []
    for partition in range(PARTITIONS):
        tenant = tenant_in(partition)
        jobs = [new_id() for _ in range(of_each)]
        events = [(tenant.encode(), event_bytes(job_request(), tenant, event_id=job)) for job in jobs]
        await log.append("job-requests", partition, events)
        sent += jobs
    return sent


def repeated_steps(journal: list[Record]) -> list[OffsetRun]:
    """Runs of offsets that begin before an earlier step of the same fold had ended."""
    ends: dict[tuple[int, str], int] = {}
    repeated: list[OffsetRun] = []
    for record in journal:
        step = decode(record.value).data
        assert isinstance(step, StepJournal)
        for run in step.runs:
            if run.first <= ends.get((step.partition, run.topic), -1):
                repeated.append(run)
            ends[step.partition, run.topic] = run.last
    return repeated


def ids(sent: list[list[str]]) -> set[str]:
    return {job for jobs in sent for job in jobs}


async def decided_all(log: KafkaLog, jobs: set[str]) -> None:
    """Wait until there is a decision on each of ``jobs``; decodes each record once."""
    waiting, looked_at = set(jobs), 0

    def enough(records: list[Record]) -> bool:
        nonlocal looked_at
        waiting.difference_update(decided(records[looked_at:]))
        looked_at = len(records)
        return not waiting

    await log.until("job-decisions", enough)


def decided(records: list[Record]) -> Counter[str]:
    bodies = [decode(record.value).data for record in records]
    return Counter(body.job_id for body in bodies if isinstance(body, JobDecided))
