"""The executor: a plain process that offers slots, takes the jobs dispatched to it, and reports each attempt.

It is not a fold: execution can repeat, its outcome cannot. The result rows of an attempt are in Postgres, keyed by job
and attempt, before the attempt is reported; the scheduler accepts the first report of a job, and readers see the rows
of that attempt alone. An executor that dies is noticed by its missing heartbeats; its jobs return to the queue.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import socket
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import structlog
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.adapters.kafka import dead_letter_form
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.stopping import stop_producer
from settler_streams.adapters.postgres.failures import DRIVER_ERRORS, refuses_row
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.results import check_results_writable, write_results
from settler_streams.core.scheduler import ATTEMPTS_MAX, LEASE_MS
from settler_streams.errors import (
    ConfigurationError,
    Disposition,
    OutsideTenantError,
    RecordError,
    SettlerError,
    StalledError,
    UnavailableError,
)
from settler_streams.events import (
    CONTENT_TYPE,
    AttemptFinished,
    Envelope,
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
from settler_streams.executor.children import ChildProcesses, JobOutOfMemoryError, JobTimedOutError
from settler_streams.executor.requests import RequestReader
from settler_streams.executor.work import AttemptRows, run_job
from settler_streams.ids import PLATFORM, JobId, TenantId, uuid7
from settler_streams.settings import Settings
from settler_streams.signals import stop_on_signals
from settler_streams.topology import Topology, full_name, load_topology

log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 2.0
"""A fifth of the lease: four heartbeats may be lost before the jobs are given to another executor."""
DRAIN_DEADLINE_S = 20.0
"""At SIGTERM, running attempts may finish for this long; what is left returns to the queue when the executor leaves,
and has cost an attempt. What had been dispatched and not begun returns at once, and has not."""
SEND_DEADLINE_S = 30.0
"""Longest wait for the broker to take a report; beyond it the executor stops, and its lease ends."""
UNAVAILABLE_PAUSE_S = 2.0
"""What an attempt that met a service out of order waits before its report, times its number: five outlast 20 s.
It keeps its slot meanwhile; without the pause an outage of a second would use up the attempts of job after job."""

WRITE_S_MAX = 120.0
"""How long an attempt tries to write its result: twice an ordinary failover of the database. Beyond it the executor
stops if nobody's can be written, and does not start before that; one that alone cannot be written is tried again."""
WRITE_PAUSE_S = 1.0
"""Between two tries of that."""

DETAIL_LENGTH_MAX = 2_000
"""An error may quote the input; this much of it is enough to understand the failure."""

Dispatch = tuple[TenantId, JobDispatched, bytes | None]


class Executor:
    """One incarnation of an executor in one worker pool."""

    def __init__(self, settings: Settings, topology: Topology, *, pool: int = 0, name: str | None = None) -> None:
        self._settings = settings
        self._topology = topology
        self._pool_number = pool
        self._name = name or f"{socket.gethostname()}-{os.getpid()}"
        self._incarnation = uuid7(time.time_ns() // 1_000_000)
        self._running: dict[JobId, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._reader = RequestReader(settings)
        self._dispatches = Cluster.of(settings).consumer(
            isolation_level="read_committed",
            enable_auto_commit=False,
            fetch_max_wait_ms=100,
        )
        self._producer = Cluster.of(settings).producer(
            enable_idempotence=True, acks="all", linger_ms=0,
            max_request_size=4 * 1024 * 1024,  # a dead letter is larger than its request
        )  # fmt: skip
        self._database: TenantConnectionPool
        self._children = ChildProcesses(
            min(self._slots, os.cpu_count() or 1),
            memory_bytes_max=settings.executor_memory_mib * 1024 * 1024,
            job_s_max=settings.executor_job_s,
        )

    async def run(self, stop: asyncio.Future[None]) -> None:
        """Join the pool, work until ``stop`` or a failure, then leave it.

        Dispatches are followed from the end of their topic, and before the pool learns of this incarnation: none that
        is addressed to it can lie further back.
        """
        self._database = await TenantConnectionPool.open(self._settings)
        try:
            await check_results_writable(self._database)  # or each start would take jobs only to give them back
            await self._connect()
            await self._join()
            log.info("executor ready", executor=self._name, incarnation=self._incarnation, slots=self._slots)
            tasks = [asyncio.create_task(self._heartbeats()), asyncio.create_task(self._follow())]
            waited: list[asyncio.Future[Any]] = [stop, self._failure, *tasks]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)  # from here on no attempt begins
            await self._drain()
            for error in [e for t in tasks if not t.cancelled() and (e := t.exception()) is not None]:
                raise error
            if self._failure.done():
                raise self._failure.result()
        finally:
            await self._disconnect()

    @property
    def _slots(self) -> int:
        return self._settings.executor_slots

    async def _connect(self) -> None:
        await asyncio.gather(self._producer.start(), self._dispatches.start(), self._reader.start())
        await self._children.start()
        tp = TopicPartition(full_name(self._settings.deployment, "job-dispatches"), self._pool_number)
        self._dispatches.assign([tp])
        await self._dispatches.seek_to_end(tp)
        await self._dispatches.position(tp)

    async def _disconnect(self) -> None:
        self._children.close()
        await asyncio.gather(self._dispatches.stop(), self._reader.stop(), stop_producer(self._producer))
        await self._database.close()

    async def _drain(self) -> None:
        """Say what still runs, so that all else is placed elsewhere; let it end, under the lease; then leave."""
        await self._say_what_runs()
        saying = asyncio.create_task(self._say_again())
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=DRAIN_DEADLINE_S)
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
        await self._say_what_runs()
        for task in self._running.values():
            task.cancel()
        await self._report(ExecutorLeft(executor=self._name, incarnation=self._incarnation))

    async def _say_again(self) -> None:
        """Renew the lease, and give back at once what is missing: jobs that have met a fault of the database meanwhile.
        By a heartbeat they would be missed a lease later."""
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            await self._say_what_runs()

    async def _say_what_runs(self) -> None:
        running = tuple(sorted(self._running))
        await self._report(ExecutorDraining(executor=self._name, incarnation=self._incarnation, running=running))

    async def _join(self) -> None:
        await self._report(ExecutorJoined(executor=self._name, incarnation=self._incarnation, slots=self._slots))

    async def _heartbeats(self) -> None:
        """Renew the lease. An executor that comes too late has lost it and must join anew, as another incarnation.

        Whether a lease still runs is for the log's own time to say, which this process does not see: after a broker
        that stood still, a tick may lie before the heartbeat that was due. So each heartbeat comes with the join: it
        changes nothing while the lease runs, or once a newer incarnation holds it, and opens a lease that has ended.
        """
        renewed_s = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            if time.monotonic() - renewed_s > LEASE_MS / 1000:
                raise UnavailableError(f"no heartbeat for more than {LEASE_MS} ms: the lease of {self._name} has ended")
            await self._join()
            running = tuple(sorted(self._running))
            await self._report(ExecutorHeartbeat(executor=self._name, incarnation=self._incarnation, running=running))
            renewed_s = time.monotonic()

    async def _follow(self) -> None:
        async for record in self._dispatches:
            dispatch = _addressed(record, self._incarnation)
            if dispatch is not None:
                self._begin(*dispatch)

    def _begin(self, tenant: TenantId, dispatch: JobDispatched, traceparent: bytes | None) -> asyncio.Task[None]:
        """Start one attempt. It takes the place of an earlier one at the same job, which may still await the broker's
        answer to its report when the scheduler has already dispatched the next."""
        job_id = JobId(dispatch.job_id)
        task = self._running[job_id] = asyncio.create_task(self._attempt(tenant, dispatch, traceparent))
        task.add_done_callback(partial(self._on_attempt_done, job_id))
        return task

    def _on_attempt_done(self, job_id: JobId, task: asyncio.Task[None]) -> None:
        if self._running.get(job_id) is task:
            del self._running[job_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("executor stops", job=job_id, error=repr(error))
            if not self._failure.done():
                self._failure.set_result(error)

    async def _attempt(self, tenant: TenantId, dispatch: JobDispatched, traceparent: bytes | None) -> None:
        """Run one attempt and report it. The slot is free, here and in the scheduler's eyes, once it is reported.

        Raises:
            ConfigurationError, StalledError: no attempt can be brought to its end here. This one is not reported: the
                executor stops, and the scheduler gives the job to another.
        """
        job_id = JobId(dispatch.job_id)
        started = time.perf_counter_ns()
        try:
            rows = await self._compute(tenant, job_id, dispatch)
            await self._store(tenant, job_id, dispatch.attempt, rows)
            finished = self._finished(dispatch, JobStatus.SUCCEEDED, rows.worker_us, rows=rows)
        except (ConfigurationError, StalledError):
            raise
        except Exception as error:
            # Whatever a job raises ends this attempt, never the executor with everyone else's jobs.
            worker_us = (time.perf_counter_ns() - started) // 1000
            reason, detail = _explained(error)
            foreseen = isinstance(error, SettlerError | BrokenProcessPool)
            log.warning(
                "attempt failed", job=job_id, attempt=dispatch.attempt, reason=reason, error=str(error)[:300],
                exc_info=None if foreseen else error,
            )  # fmt: skip
            finished = self._finished(dispatch, JobStatus.FAILED, worker_us, reason=reason, detail=detail)
            if reason == "unavailable":
                await asyncio.sleep(UNAVAILABLE_PAUSE_S * min(dispatch.attempt, ATTEMPTS_MAX - 1))
        await self._report(finished, tenant, traceparent)

    async def _compute(self, tenant: TenantId, job_id: JobId, dispatch: JobDispatched) -> AttemptRows:
        request, record = await self._reader.read(tenant, job_id, dispatch.request)
        try:
            return await self._children.run(run_job, request, tenant, self._settings.record_sets_dir)
        except OutsideTenantError as error:
            await self._dead_letter(record, RecordError("outside-tenant", str(error)))
            raise

    async def _store(self, tenant: TenantId, job_id: JobId, attempt: int, rows: AttemptRows) -> None:
        """Write the result. A database that fails everybody fails no attempt, which is kept under the lease meanwhile.

        Raises:
            RecordError, InvalidRequestError, NotFoundError, PostgresError: because of these rows, or of this tenant.
            UnavailableError: not written, though the database takes results of others.
            ConfigurationError, StalledError: it takes nobody's; the latter, for all of :data:`WRITE_S_MAX`.
        """
        deadline_s = time.monotonic() + WRITE_S_MAX
        while True:
            try:
                await write_results(
                    self._database, tenant, job_id, attempt,
                    matches=rows.matches, unmatched=rows.unmatched, report=rows.report,
                )  # fmt: skip
            except (UnavailableError, *DRIVER_ERRORS) as error:
                if refuses_row(error):
                    raise
                failure = error
            else:
                return
            log.warning("result not written", job=job_id, attempt=attempt, error=repr(failure))
            late = time.monotonic() > deadline_s
            try:
                await self._check_database()
            except UnavailableError as error:
                if late or self._failure.done():  # an executor that stops waits no longer
                    raise StalledError(f"no result could be written for {WRITE_S_MAX:g} s: {error}") from error
            else:
                if late or not isinstance(failure, UnavailableError):
                    raise UnavailableError("the result was not written; the executor's log says why") from failure
            await asyncio.sleep(WRITE_PAUSE_S)

    async def _check_database(self) -> None:
        """Whether it takes results, by a connection of its own: those of the pool may all wait for one tenant.

        Raises:
            ConfigurationError, UnavailableError: as :func:`check_results_writable`.
        """
        pool = await TenantConnectionPool.open(self._settings.model_copy(update={"db_pool_size": 1}))
        try:
            await check_results_writable(pool)
        finally:
            await pool.close()

    async def _dead_letter(self, record: ConsumerRecord[bytes, bytes], error: RecordError) -> None:
        """Keep a request that tried to leave its tenant's directory, for whoever looks into it.

        It is written before the attempt is reported: a crash in between may repeat it, and never loses it.
        """
        letter = dead_letter_form.letter(record, "executor", error, time.time_ns() // 1_000_000)
        topic = full_name(self._settings.deployment, "dead-letters")
        partition = record.partition % self._topology.partitions("dead-letters")
        async with asyncio.timeout(SEND_DEADLINE_S):
            await self._producer.send_and_wait(
                topic, letter.value, key=letter.key, partition=partition, headers=letter.headers
            )

    def _finished(
        self,
        dispatch: JobDispatched,
        status: JobStatus,
        worker_us: int,
        *,
        rows: AttemptRows | None = None,
        reason: str | None = None,
        detail: str = "",
    ) -> AttemptFinished:
        return AttemptFinished(
            job_id=dispatch.job_id,
            attempt=dispatch.attempt,
            incarnation=self._incarnation,
            status=status,
            worker_us=worker_us,
            matches=rows.match_count if rows else 0,
            unmatched=rows.unmatched_count if rows else 0,
            reason=reason,
            detail=detail,
        )

    async def _report(self, data: Part, tenant: TenantId = PLATFORM, traceparent: bytes | None = None) -> None:
        now = dt.datetime.now(dt.UTC)
        event_id = uuid7(int(now.timestamp() * 1000))
        event = envelope(data, event_id=event_id, source=f"/executor/{self._name}", tenant=tenant, time=now)
        headers = [("content-type", CONTENT_TYPE.encode())]
        if traceparent is not None:
            headers.append(("traceparent", traceparent))
        topic = full_name(self._settings.deployment, "pool-inputs")
        async with asyncio.timeout(SEND_DEADLINE_S):
            await self._producer.send_and_wait(
                topic, encode(event), key=self._name.encode(), partition=self._pool_number, headers=headers
            )


def _addressed(record: ConsumerRecord[bytes, bytes], incarnation: str) -> Dispatch | None:
    event: Envelope[Part] = decode(record.value)
    if not isinstance(event.data, JobDispatched) or event.data.incarnation != incarnation:
        return None
    traceparent = next((value for name, value in record.headers if name == "traceparent"), None)
    return event.tenantid, event.data, traceparent


def _explained(error: Exception) -> tuple[str, str]:
    """What the report says of a failed attempt: a reason, and a detail that the tenant may read."""
    if isinstance(error, BrokenProcessPool):
        return "worker_crashed", str(error)
    if isinstance(error, JobTimedOutError):
        return "timed_out", str(error)
    if isinstance(error, JobOutOfMemoryError):
        return "out_of_memory", str(error)
    if isinstance(error, OutsideTenantError):
        return "outside_tenant", str(error)
    if not isinstance(error, SettlerError):
        return "failed", f"unexpected {type(error).__name__}; the executor's log has the rest"
    reasons = {Disposition.REFUSE: "invalid_request", Disposition.RETRY: "unavailable"}
    return reasons.get(error.disposition, "failed"), str(error).replace("\0", "")[:DETAIL_LENGTH_MAX]


async def run(settings: Settings, *, name: str | None = None, pool: int = 0) -> None:
    """An executor process of one worker pool, until SIGTERM, SIGINT or a failure.

    Raises:
        ConfigurationError: there is no such pool.
    """
    topology = load_topology()
    if not 0 <= pool < topology.worker_pools:
        raise ConfigurationError(f"there is no worker pool {pool}; the topology has {topology.worker_pools}, from 0")
    executor = Executor(settings, topology, name=name, pool=pool)
    await executor.run(stop_on_signals())
