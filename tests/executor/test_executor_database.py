"""What is wrong with the database is no job's result: an attempt waits for it, or its executor stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from settler_streams.core import scheduler
from settler_streams.core.scheduler import LEASE_MS
from settler_streams.dev.stack.ports import free_port
from settler_streams.errors import ConfigurationError, StalledError, UnavailableError
from settler_streams.events import (
    ExecutorDraining,
    ExecutorHeartbeat,
    ExecutorLeft,
    JobFinished,
    JobRequested,
    JobStatus,
    decode,
)
from settler_streams.executor import process as executor_module
from settler_streams.executor.process import Executor
from settler_streams.ids import JobId, TenantId
from settler_streams.settings import Settings
from tests.agents.conftest import Platform
from tests.chaos.proxy import CALM, Proxy, Weather
from tests.executor.executors import executor_inside
from tests.executor.strange_jobs import Held
from tests.executor.test_executor import result_of
from tests.executor.test_executor_drain import until_said
from tests.runtime.kafka_log import Record
from tests.runtime.requests import event_bytes, job_request, new_id

pytestmark = pytest.mark.services

LOST = Weather(refuses=True)


@pytest.fixture
async def owner(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the tables' owner."""
    connection = await asyncpg.connect(settings.postgres_url(owner=True))
    yield connection
    await connection.close()


@pytest.fixture
async def way(settings: Settings) -> AsyncIterator[Proxy]:
    """The executor's own way to PostgreSQL: what is cut here, the other processes do not notice."""
    proxy = Proxy("postgres", free_port(), settings.db_port, settings.db_host)
    await proxy.start()
    yield proxy
    await proxy.stop()


async def test_a_database_that_takes_no_results_stops_the_executor_and_ends_no_job(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three jobs on two slots: neither the two that run nor the one that waits may end, here or at the next start."""
    monkeypatch.setattr(scheduler, "ATTEMPTS_MAX", 1)
    with pytest.raises(ConfigurationError, match=r"takes no results.*permission denied"):
        async with executor_inside(settings, platform.log, "forbidden"):
            await owner.execute("REVOKE INSERT ON matches FROM settler_services")
            job_ids = [await submit(platform, platform.tenants[0], job_request(2)) for _ in range(3)]
            await has_left(platform, "forbidden")
    try:
        with pytest.raises(ConfigurationError, match="takes no results"):
            await Executor(settings, platform.log.topology, name="forbidden-again").run(never())
    finally:
        await owner.execute("GRANT INSERT ON matches TO settler_services")
    assert await ended(platform, job_ids) == []
    async with executor_inside(settings, platform.log, "allowed"):
        finished = [await result_of(platform, job_id) for job_id in job_ids]
    assert {(one.status, one.matches, one.executor) for one in finished} == {(JobStatus.SUCCEEDED, 2, "allowed")}


@pytest.mark.slow
async def test_a_job_that_meets_the_fault_while_its_executor_drains_has_lost_no_attempt_either(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three jobs one meets it first, one when it ends in the drain, and one ends there when the fault is gone."""
    monkeypatch.setattr(executor_module, "HEARTBEAT_INTERVAL_S", 0.2)
    monkeypatch.setattr(scheduler, "ATTEMPTS_MAX", 1)
    monkeypatch.setattr(executor_module, "DRAIN_DEADLINE_S", 120.0)
    longer_than_the_lease = int(LEASE_MS / 1000 / 0.2) + 5
    log, tenant, jobs, ends = platform.log, platform.tenants[0], [], [tmp_path / name for name in "123"]
    with pytest.raises(ConfigurationError, match="takes no results"):
        async with executor_inside(settings.model_copy(update={"executor_slots": 3}), log, "in-part"):
            for end in ends:
                with monkeypatch.context() as patched:
                    patched.setattr(executor_module, "run_job", Held(str(end)))
                    jobs.append(await submit(platform, tenant, job_request(2)))
                    await until_said(log, "in-part", ExecutorHeartbeat, running=tuple(sorted(jobs)))
            await owner.execute("REVOKE INSERT ON matches FROM settler_services")
            try:
                ends[0].touch()
                left = tuple(sorted(jobs[1:]))
                await until_said(log, "in-part", ExecutorDraining, running=left, count=longer_than_the_lease)
                ends[1].touch()
                await until_said(log, "in-part", ExecutorDraining, running=(jobs[2],))
            finally:
                await owner.execute("GRANT INSERT ON matches TO settler_services")
            ends[2].touch()
            ending = await result_of(platform, jobs[2])
            await has_left(platform, "in-part")
    assert (ending.status, ending.executor) == (JobStatus.SUCCEEDED, "in-part")
    async with executor_inside(settings, log, "whole"):
        finished = [await result_of(platform, job_id) for job_id in jobs[:2]]
    assert {(one.status, one.executor) for one in finished} == {(JobStatus.SUCCEEDED, "whole")}


async def test_what_fails_for_one_tenant_alone_fails_its_job_in_the_end_and_stops_nothing(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a schema of its own would that has missed a migration; it must not take executor after executor with it."""
    monkeypatch.setattr(executor_module, "UNAVAILABLE_PAUSE_S", 0.05)
    broken, whole = platform.tenants
    await owner.execute(
        f"""
        CREATE FUNCTION missing_table() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'relation "matches" does not exist' USING ERRCODE = '42P01'; END $$;
        CREATE TRIGGER missing_table BEFORE INSERT ON matches
        FOR EACH ROW WHEN (NEW.tenant_id = '{broken}') EXECUTE FUNCTION missing_table()
        """
    )
    try:
        async with executor_inside(settings, platform.log, "unmoved"):
            failed = await result_of(platform, await submit(platform, broken, job_request(2)))
            finished = await result_of(platform, await submit(platform, whole, job_request(2)))
    finally:
        await owner.execute("DROP FUNCTION missing_table() CASCADE")
    assert (failed.status, failed.reason, failed.attempt) == (JobStatus.FAILED, "unavailable", 5)
    assert "relation" not in failed.detail
    assert (finished.status, finished.executor) == (JobStatus.SUCCEEDED, "unmoved")


async def test_a_database_that_is_away_for_a_while_costs_no_attempt(
    platform: Platform, settings: Settings, way: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_module, "HEARTBEAT_INTERVAL_S", 0.2)
    monkeypatch.setattr(executor_module, "WRITE_PAUSE_S", 0.1)
    async with executor_inside(through(settings, way), platform.log, "waiting"):
        lose(way)
        job_id = await submit(platform, platform.tenants[0], job_request(2))

        def is_kept(records: list[Record]) -> bool:
            """Ten tries at least, each of a write and of the check, and the lease is renewed for this job."""
            bodies = [decode(record.value).data for record in records if record.key == b"waiting"]
            kept = any(isinstance(body, ExecutorHeartbeat) and body.running == (job_id,) for body in bodies)
            return kept and way.counts["refused"] >= 20

        await platform.log.until("pool-inputs", is_kept)
        way.set(CALM)
        finished = await result_of(platform, job_id)
    assert (finished.status, finished.matches, finished.attempt) == (JobStatus.SUCCEEDED, 2, 1)


async def test_a_database_that_stays_away_stops_the_executor_and_ends_no_job(
    platform: Platform, settings: Settings, way: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ATTEMPTS_MAX", 1)
    monkeypatch.setattr(executor_module, "WRITE_S_MAX", 0.5)
    monkeypatch.setattr(executor_module, "WRITE_PAUSE_S", 0.1)
    with pytest.raises(StalledError, match="no result could be written"):
        async with executor_inside(through(settings, way), platform.log, "cut-off"):
            lose(way)
            job_id = await submit(platform, platform.tenants[0], job_request(2))
            await has_left(platform, "cut-off")
    with pytest.raises(UnavailableError):
        await Executor(through(settings, way), platform.log.topology, name="cut-off-still").run(never())
    assert await ended(platform, [job_id]) == []
    async with executor_inside(settings, platform.log, "connected"):
        finished = await result_of(platform, job_id)
    assert (finished.status, finished.executor) == (JobStatus.SUCCEEDED, "connected")


def through(settings: Settings, way: Proxy) -> Settings:
    return settings.model_copy(update={"db_host": "127.0.0.1", "db_port": way.port, "db_pool_wait_ms": 2_000})


def lose(way: Proxy) -> None:
    way.set(LOST)
    way.reset()


def never() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


async def submit(platform: Platform, tenant: TenantId, request: JobRequested) -> JobId:
    job_id, partition = new_id(), platform.tenants.index(tenant)
    await platform.log.append(
        "job-requests", partition, [(tenant.encode(), event_bytes(request, tenant, event_id=job_id))]
    )
    return job_id


async def has_left(platform: Platform, name: str) -> None:
    """Wait until the pool's log holds the executor's farewell."""

    def left(records: list[Record]) -> bool:
        bodies = [decode(record.value).data for record in records if record.key == name.encode()]
        return any(isinstance(body, ExecutorLeft) for body in bodies)

    await platform.log.until("pool-inputs", left)


async def ended(platform: Platform, job_ids: list[JobId]) -> list[JobFinished]:
    bodies = [event.data for event in await platform.log.events("job-results")]
    return [body for body in bodies if isinstance(body, JobFinished) and body.job_id in job_ids]
