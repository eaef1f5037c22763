"""Executors: they take dispatches, report, report twice, die in the middle, and report after they were given up."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Coroutine
from random import Random
from typing import Any
from zlib import crc32

import msgspec
from aiokafka.structs import TopicPartition

from settler_streams.events import (
    AttemptFinished,
    ExecutorDraining,
    ExecutorHeartbeat,
    ExecutorJoined,
    ExecutorLeft,
    JobDispatched,
    JobStatus,
    Part,
    decode,
    encode,
    envelope,
)
from settler_streams.ids import PLATFORM, TenantId
from tests.simulation.broker import Broker
from tests.simulation.misfortunes import Faults
from tests.simulation.partitions import READ_COMMITTED
from tests.simulation.virtual_time import elapse

HEARTBEAT_S = 6.0
WORK_S_MAX = 3.0
LATE_S_MAX = 15.0
"""A dead executor's last report may still be on its way: longer than a lease."""
SLOTS = 2


class Executor:
    """One executor under a fixed name, with a new incarnation after each death."""

    def __init__(self, name: str, deployment: str, broker: Broker, random: Random, faults: Faults) -> None:
        self._name = name
        self._mark = crc32(name.encode()) & 0xFFFF
        self._deployment = deployment
        self._broker = broker
        self._random = random
        self._faults = faults
        self._incarnations = 0
        self._events = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[str, None] = {}
        self._dispatches = TopicPartition(f"{deployment}.job-dispatches", 0)

    async def run(self) -> None:
        """Live, die and live again."""
        while True:
            self._incarnations += 1
            incarnation = f"d0000000-0000-7000-8000-{self._incarnations:08x}{self._mark:04x}"
            self._running = {}
            self._say(ExecutorJoined(executor=self._name, incarnation=incarnation, slots=SLOTS))
            dead = asyncio.get_running_loop().create_future()
            self._spawn(self._beat(incarnation))
            self._spawn(self._follow(incarnation, dead))
            await dead
            self.stop()
            ending = self._random.random()
            if ending < 0.15:
                self._say(ExecutorDraining(executor=self._name, incarnation=incarnation))
            if ending < 0.3:
                self._say(ExecutorLeft(executor=self._name, incarnation=incarnation))
            await elapse(self._random.random() * 6)

    def stop(self) -> None:
        """Whatever it does ends at once."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def _say(self, data: Part, tenant: TenantId = PLATFORM) -> None:
        self._events += 1
        event_id = f"f0000000-0000-7000-8000-{self._events:08x}{self._mark:04x}"
        time = dt.datetime.fromtimestamp(self._broker.now_ms / 1000, dt.UTC)
        event = envelope(data, event_id=event_id, source=f"/{self._name}", tenant=tenant, time=time)
        self._broker.append(f"{self._deployment}.pool-inputs", 0, b"", encode(event))

    async def _beat(self, incarnation: str) -> None:
        while True:
            await elapse(HEARTBEAT_S)
            beat = ExecutorHeartbeat(executor=self._name, incarnation=incarnation, running=tuple(self._running))
            self._say(beat)

    async def _follow(self, incarnation: str, dead: asyncio.Future[None]) -> None:
        """Take whatever is dispatched to this incarnation."""
        position = self._broker.partition(self._dispatches).stable_end
        while True:
            records, position = self._broker.partition(self._dispatches).read(position, READ_COMMITTED, 10)
            for record in records:
                event = decode(record.value)
                job = event.data
                if isinstance(job, JobDispatched) and (job.executor, job.incarnation) == (self._name, incarnation):
                    self._spawn(self._work(event.tenantid, job, dead))
            if not records:
                await self._broker.until_changed([self._dispatches], HEARTBEAT_S)

    async def _work(self, tenant: TenantId, job: JobDispatched, dead: asyncio.Future[None]) -> None:
        random = self._random
        self._running[job.job_id] = None
        await elapse(random.random() * WORK_S_MAX)
        report = self._report(job)
        if self._faults.raging and random.random() < 0.08:
            self._faults.count("executor died")
            if random.random() < 0.5:
                self._faults.count("report after the executor's death")
                asyncio.get_running_loop().call_later(random.random() * LATE_S_MAX, self._say, report, tenant)
            if not dead.done():
                dead.set_result(None)
            return
        self._running.pop(job.job_id, None)
        self._say(report, tenant)
        if self._faults.raging and random.random() < 0.15:
            self._faults.count("executor reported twice")
            await elapse(random.random() * WORK_S_MAX)
            self._say(msgspec.structs.replace(report, worker_us=report.worker_us + 1), tenant)

    def _report(self, job: JobDispatched) -> AttemptFinished:
        failed = self._random.random() < 0.2
        return AttemptFinished(
            job_id=job.job_id,
            attempt=job.attempt,
            incarnation=job.incarnation,
            status=JobStatus.FAILED if failed else JobStatus.SUCCEEDED,
            worker_us=self._random.randint(1, 3_000_000),
            reason=self._random.choice(("unavailable", "invalid_rows")) if failed else None,
        )
