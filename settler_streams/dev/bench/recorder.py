"""How many rows a second the recorder writes into Postgres, under row-level security, each batch with its position."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import asyncpg

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.agents import recorder
from settler_streams.dev.bench import log, workload
from settler_streams.dev.bench.ground import READY_S_MAX, SEED, TENANTS, Ground, check_alive, running
from settler_streams.dev.bench.workload import BEGINNING, SOURCE, BenchTenant, Keyed
from settler_streams.dev.stack import ChildProcess
from settler_streams.errors import StateError, UnavailableError
from settler_streams.events import JobDecided, JobFinished, JobStatus, Part, QueuePriority, encode, envelope
from settler_streams.settings import Settings
from settler_streams.topology import full_name

WORK_S_MAX = 180.0
"""Ten times what the rows take on a slow machine."""
POLL_INTERVAL_S = 0.05
"""Adds at most this to a measurement of seconds."""
_COUNT_POSITIONS = "SELECT coalesce(sum(next_offset), 0) FROM stream_positions WHERE consumer = $1 AND topic = ANY($2)"
_COUNT_ROWS = "SELECT count(decision), count(outcome), (SELECT count(*) FROM executions) FROM jobs"


async def measure(ground: Ground, jobs: int) -> float:
    """Rows per second of a recorder that finds ``jobs`` decisions, and results for half of them.

    A decision writes one row; a result changes that row and writes one of its execution: ``2 * jobs`` rows in all.

    Raises:
        StateError: the tables do not hold exactly these rows.
        UnavailableError: it was not done in time.
    """
    settings = ground.deployment("recorder")
    await migrate(settings)
    await log.create_declared(settings)
    cluster, process = Cluster.of(settings), _worker(ground, settings)
    connection = await asyncpg.connect(settings.postgres_url(owner=True), timeout=READY_S_MAX)
    try:
        async with log.Load(cluster, f"{settings.deployment}.load") as load, running([process]):
            tenants = workload.tenants(TENANTS, ground.topology.tenant_partitions, SEED)
            drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
            ids = [workload.uuid_of(drawn) for _ in range(jobs)]
            await load.append(full_name(settings.deployment, "job-decisions"), decisions(tenants, ids))
            await load.append(full_name(settings.deployment, "job-results"), results(tenants, ids[: jobs // 2]))
            await asyncio.to_thread(_wait_open, process, ground.topology.tenant_partitions)
            began_s = time.perf_counter()
            await load.commit()
            await _wait_written(connection, settings, process, jobs + jobs // 2)
            seconds = time.perf_counter() - began_s
        await _check(connection, jobs)
    finally:
        await connection.close()
        await log.delete_topics(cluster, f"{settings.deployment}.")
    return 2 * jobs / seconds


def decisions(tenants: list[BenchTenant], ids: list[str]) -> Iterator[Keyed]:
    """A decision on each job."""
    now_ms = int(BEGINNING.timestamp() * 1000)
    for number, job_id in enumerate(ids):
        body = JobDecided(
            job_id=job_id,
            admitted=True,
            kind="reconciliation",
            priority=QueuePriority.NORMAL,
            requested_at_ms=now_ms + number,
            decided_at_ms=now_ms + number,
        )
        yield _keyed(tenants[number % len(tenants)], body, job_id)


def results(tenants: list[BenchTenant], ids: list[str]) -> Iterator[Keyed]:
    """A result of each job."""
    now_ms = int(BEGINNING.timestamp() * 1000)
    for number, job_id in enumerate(ids):
        body = JobFinished(
            job_id=job_id,
            status=JobStatus.SUCCEEDED,
            attempt=1,
            kind="reconciliation",
            requested_at_ms=now_ms + number,
            finished_at_ms=now_ms + number + 500,
            worker_us=100_000,
            matches=140,
            unmatched=10,
            executor="executor-1",
        )
        yield _keyed(tenants[number % len(tenants)], body, job_id)


def _keyed(tenant: BenchTenant, body: Part, job_id: str) -> Keyed:
    event = envelope(body, event_id=job_id, source=SOURCE, tenant=tenant.id, time=BEGINNING, subject=job_id)
    return Keyed(tenant.partition, tenant.root.encode(), encode(event))


def _worker(ground: Ground, settings: Settings) -> ChildProcess:
    return ground.process(settings, "worker", "settler_streams.cli.main", "worker", "--roles", recorder.ROLE)


def _wait_open(process: ChildProcess, partitions: int) -> None:
    process.wait_until(
        lambda: process.log.read_text().count('"projection opened"') >= partitions, deadline_s=READY_S_MAX
    )


async def _wait_written(connection: Any, settings: Settings, process: ChildProcess, records: int) -> None:
    """Until the positions in Postgres stand behind all records; each is counted by the record alone, not by markers."""
    consumer = f"{settings.deployment}.{recorder.ROLE}"
    topics = [full_name(settings.deployment, name) for name in ("job-decisions", "job-results")]
    done = 0
    try:
        async with asyncio.timeout(WORK_S_MAX):
            while (done := await connection.fetchval(_COUNT_POSITIONS, consumer, topics)) < records:
                check_alive([process])
                await asyncio.sleep(POLL_INTERVAL_S)
    except TimeoutError as error:
        raise UnavailableError(f"the recorder had come to {done} of {records} records in {WORK_S_MAX:.0f} s") from error


async def _check(connection: Any, jobs: int) -> None:
    found = tuple(await connection.fetchrow(_COUNT_ROWS))
    if found != (jobs, jobs // 2, jobs // 2):
        raise StateError(f"{jobs} decisions and {jobs // 2} results led to {found} decisions, outcomes and executions")
