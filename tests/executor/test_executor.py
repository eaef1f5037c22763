"""The executor: an attempt may be lost or fail, a job ends once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from settler_streams.adapters.kafka import stopping
from settler_streams.adapters.postgres.results import RowsWritten, write_results
from settler_streams.errors import InvalidRequestError, RecordError, UnavailableError
from settler_streams.events import (
    ExecutorLeft,
    FileRecords,
    InlineRecords,
    JobDispatched,
    JobEnqueued,
    JobFinished,
    JobRequested,
    JobStatus,
    MatchRules,
    Part,
    RecordRef,
    decode,
)
from settler_streams.executor import process as executor_module
from settler_streams.executor.process import Executor
from settler_streams.executor.requests import RequestReader
from settler_streams.executor.work import AttemptRows
from settler_streams.ids import PLATFORM, JobId, TenantId
from settler_streams.settings import Settings
from tests.agents.conftest import Platform
from tests.executor.executors import STOP_S_MAX, executor_inside, executor_process, has_joined, kill_group
from tests.executor.strange_jobs import CrashOnce, hang, raise_bug, take_memory
from tests.runtime.kafka_log import Record
from tests.runtime.requests import event_bytes, job_request, new_id
from tests.services.interface import Service

pytestmark = pytest.mark.services

CHILD_GONE_S_MAX = 60.0
OUTAGE_S = 5.0
"""An immediate restart of PostgreSQL, with its recovery."""
CSV = "id,amount,currency,date,reference\n1,10.00,EUR,2026-01-05,A\n"


async def test_a_file_job_is_reconciled(platform: Platform, settings: Settings) -> None:
    tenant = platform.tenants[0]
    folder = tenant_folder(settings, tenant)
    (folder / "a.csv").write_text(CSV)
    async with executor_inside(settings, platform.log, "files"):
        finished = await result_of(platform, await submit(platform, files("a.csv")))
    assert (finished.status, finished.matches, finished.unmatched) == (JobStatus.SUCCEEDED, 1, 0)
    assert (finished.attempt, finished.executor) == (1, "files")


@pytest.mark.parametrize(
    ("path", "reason"),
    [("link.csv", "outside_tenant"), ("folder/secret.csv", "outside_tenant"), ("none.csv", "invalid_request")],
)
async def test_a_path_outside_of_the_tenants_directory_is_not_read(
    platform: Platform, settings: Settings, path: str, reason: str
) -> None:
    tenant, other = platform.tenants
    secret = tenant_folder(settings, other) / "secret.csv"
    secret.write_text(CSV.replace("10.00", "987654.32"))
    folder = tenant_folder(settings, tenant)
    for link, target in ((folder / "link.csv", secret), (folder / "folder", secret.parent)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    async with executor_inside(settings, platform.log, f"paths-{new_id()}"):
        finished = await result_of(platform, await submit(platform, files(path)))
    assert (finished.status, finished.reason, finished.attempt) == (JobStatus.FAILED, reason, 1)
    assert "path" in finished.detail
    assert "987654" not in finished.detail
    assert str(settings.data_dir) not in finished.detail


async def test_an_invalid_request_fails_with_its_reason(platform: Platform, settings: Settings) -> None:
    request = JobRequested(
        left=InlineRecords(rows=({"id": "1"},)), right=InlineRecords(rows=()), rules=MatchRules(keys=("id",))
    )
    async with executor_inside(settings, platform.log, "invalid"):
        finished = await result_of(platform, await submit(platform, request))
    assert (finished.status, finished.reason, finished.attempt) == (JobStatus.FAILED, "invalid_request", 1)
    assert "rules.keys" in finished.detail


async def test_a_dispatch_that_points_to_another_record_fails(platform: Platform, settings: Settings) -> None:
    """The claim check names a place; what lies there has to be this tenant's request for this job."""
    tenant, other = platform.tenants
    log, foreign, mine = platform.log, new_id(), new_id()
    (offset,) = await log.append(
        "job-requests", 1, [(other.encode(), event_bytes(job_request(), other, event_id=foreign))]
    )
    enqueued = JobEnqueued(
        job_id=mine, root_tenant=tenant, kind="reconciliation", priority=job_request().priority, estimated_cost_us=1,
        requested_at_ms=0, request=RecordRef(topic="job-requests", partition=1, offset=offset),
    )  # fmt: skip
    async with executor_inside(settings, log, "mismatch"):
        await log.append("pool-inputs", 0, [(tenant.encode(), event_bytes(enqueued, tenant, event_id=mine))])
        finished = await result_of(platform, mine)
        await result_of(platform, foreign)
    assert (finished.status, finished.reason) == (JobStatus.FAILED, "failed")
    assert "request-mismatch" in finished.detail


async def test_a_request_that_is_gone_from_the_log_is_said_to_be_gone(settings: Settings, platform: Platform) -> None:
    reader = RequestReader(settings)
    await reader.start()
    try:
        ref = RecordRef(topic="job-requests", partition=0, offset=10**6)
        with pytest.raises(RecordError, match="request-gone"):
            await reader.read(platform.tenants[0], new_id(), ref)
    finally:
        await reader.stop()


async def test_a_crashed_child_process_costs_one_attempt(
    platform: Platform, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "crashed"
    monkeypatch.setattr(executor_module, "run_job", CrashOnce(str(marker)))
    async with executor_inside(settings, platform.log, "crashing"):
        finished = await result_of(platform, await submit(platform, job_request(3)))
    assert marker.exists()
    assert (finished.status, finished.matches, finished.attempt) == (JobStatus.SUCCEEDED, 3, 2)


async def test_a_job_that_raises_fails_and_the_executor_goes_on(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw: one job must not take executor after executor with it."""
    async with executor_inside(settings, platform.log, "raising"):
        monkeypatch.setattr(executor_module, "run_job", raise_bug)
        finished = await result_of(platform, await submit(platform, job_request()))
        monkeypatch.undo()
        next_one = await result_of(platform, await submit(platform, job_request()))
    assert (finished.status, finished.reason, finished.attempt) == (JobStatus.FAILED, "failed", 1)
    assert "LookupError" in finished.detail
    assert "internal matter" not in finished.detail
    assert next_one.status is JobStatus.SUCCEEDED


async def test_a_second_attempt_may_begin_before_the_first_ones_report_was_acknowledged(
    settings: Settings, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler can be faster than the broker's answer: both attempts are then under way here for a moment."""
    executor = Executor(settings, platform.log.topology, name="overlap")
    job_id, tenant = new_id(), platform.tenants[0]
    release = asyncio.Event()

    def dispatch(attempt: int) -> JobDispatched:
        return JobDispatched(
            job_id=job_id, attempt=attempt, executor="overlap", incarnation=executor._incarnation,
            kind="reconciliation", request=RecordRef(topic="job-requests", partition=0, offset=0),
        )  # fmt: skip

    async def compute(_tenant: TenantId, _job_id: JobId, dispatched: JobDispatched) -> AttemptRows:
        if dispatched.attempt == 2:
            await release.wait()
        raise InvalidRequestError("enough")

    async def report(_data: Part, *_rest: object) -> None:
        if _data.attempt == 1:  # type: ignore[attr-defined]
            executor._begin(tenant, dispatch(2), None)

    monkeypatch.setattr(executor, "_compute", compute)
    monkeypatch.setattr(executor, "_report", report)
    first = executor._begin(tenant, dispatch(1), None)
    await first
    (second,) = executor._running.values()
    assert second is not first, "the heartbeat still names the job"
    release.set()
    await second
    assert executor._running == {}
    assert not executor._failure.done()
    executor._children.close()


async def test_an_executor_whose_lease_has_ended_gets_work_again(platform: Platform, settings: Settings) -> None:
    """The log's time may end a lease that its executor believes in, as after a broker that stood still."""
    log = platform.log
    async with executor_inside(settings, log, "believer") as executor:
        ended = ExecutorLeft(executor="believer", incarnation=executor._incarnation)
        await log.append("pool-inputs", 0, [(b"believer", event_bytes(ended, PLATFORM))])
        finished = await result_of(platform, await submit(platform, job_request()))
    assert (finished.status, finished.executor) == (JobStatus.SUCCEEDED, "believer")


async def test_an_outage_of_the_database_delays_a_job_and_does_not_fail_it(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried_s: list[float] = []

    async def restarting(*args: Any, **kwargs: Any) -> RowsWritten:
        tried_s.append(time.monotonic())
        if tried_s[-1] - tried_s[0] < OUTAGE_S:
            raise UnavailableError("connection refused")
        return await write_results(*args, **kwargs)

    monkeypatch.setattr(executor_module, "write_results", restarting)
    async with executor_inside(settings, platform.log, "patient"):
        finished = await result_of(platform, await submit(platform, job_request()))
    assert (finished.status, finished.attempt) == (JobStatus.SUCCEEDED, 1), finished
    assert len(tried_s) > 1, "the same attempt, until it is written"


async def test_a_job_that_never_ends_does_not_keep_the_executor_from_ending(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of the drain its process is killed, and the job goes to the next executor."""
    monkeypatch.setattr(executor_module, "DRAIN_DEADLINE_S", 0.2)
    with monkeypatch.context() as patched:
        patched.setattr(executor_module, "run_job", hang)
        async with executor_inside(settings, platform.log, "hanging") as executor:
            job_id = await submit(platform, job_request())
            await platform.log.until("job-dispatches", lambda records: dispatched(records, job_id) == [1])
            children = [psutil.Process(child.pid) for child in executor._children.processes]
    assert children
    _, alive = psutil.wait_procs(children, timeout=CHILD_GONE_S_MAX)
    assert alive == []
    async with executor_inside(settings, platform.log, "next"):
        finished = await result_of(platform, job_id)
    assert (finished.status, finished.attempt) == (JobStatus.SUCCEEDED, 2)


async def test_a_job_that_never_ends_gives_its_slot_back(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = settings.model_copy(update={"executor_job_s": 3, "executor_slots": 1})
    async with executor_inside(bounded, platform.log, "deadline") as executor:
        monkeypatch.setattr(executor_module, "run_job", hang)
        finished = await result_of(platform, await submit(platform, job_request()))
        monkeypatch.undo()
        executor._children._job_s_max = 120  # the next one begins with the imports of a new child
        next_one = await result_of(platform, await submit(platform, job_request()))
    assert (finished.status, finished.reason, finished.attempt) == (JobStatus.FAILED, "timed_out", 1)
    assert next_one.status is JobStatus.SUCCEEDED


async def test_a_job_without_end_in_memory_fails_once(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with executor_inside(settings, platform.log, "memory"):
        monkeypatch.setattr(executor_module, "run_job", take_memory)
        finished = await result_of(platform, await submit(platform, job_request()))
        monkeypatch.undo()
        next_one = await result_of(platform, await submit(platform, job_request()))
    assert (finished.status, finished.reason, finished.attempt) == (JobStatus.FAILED, "out_of_memory", 1)
    assert next_one.status is JobStatus.SUCCEEDED


async def test_an_executor_that_kafka_no_longer_hears_ends(
    platform: Platform, settings: Settings, kafka: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why. Its producer would wait for the acknowledgement for ever."""
    executor = Executor(settings, platform.log.topology, name="unheard")
    stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(executor.run(stop))
    try:
        await has_joined(platform.log, "unheard")
        monkeypatch.setattr(executor_module, "SEND_DEADLINE_S", 0.5)
        monkeypatch.setattr(stopping, "DELIVERY_DEADLINE_S", 0.5)
        kafka.pause()
        stop.set_result(None)
        ended, _ = await asyncio.wait([task], timeout=STOP_S_MAX)
    finally:
        kafka.resume()
        task.cancel()
    assert ended
    assert isinstance(task.exception(), TimeoutError)


@pytest.mark.slow
async def test_a_killed_executors_job_is_done_by_another(platform: Platform, settings: Settings) -> None:
    """SIGKILL in mid-job: the lease ends ten seconds later, and the second attempt's result is the only one."""
    log = platform.log
    tenant = platform.tenants[0]
    folder = tenant_folder(settings, tenant)
    (folder / "a.csv").write_text(CSV)
    async with executor_process(settings, log, "victim") as victim:
        os.kill(victim.pid, signal.SIGSTOP)
        job_id = await submit(platform, files("a.csv"))
        await log.until("job-dispatches", lambda records: dispatched(records, job_id) == [1])
        kill_group(victim)
        await victim.wait()
    async with executor_inside(settings, log, "heir"):
        finished = await result_of(platform, job_id)
    assert (finished.status, finished.attempt, finished.executor) == (JobStatus.SUCCEEDED, 2, "heir")
    results = [event.data for event in await log.events("job-results")]
    assert [r.job_id for r in results if isinstance(r, JobFinished)].count(job_id) == 1


def tenant_folder(settings: Settings, tenant: TenantId) -> Path:
    folder = settings.record_sets_dir / tenant
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def files(path: str) -> JobRequested:
    records = FileRecords(path=path, format="csv")
    return JobRequested(left=records, right=records, rules=MatchRules())


async def submit(platform: Platform, request: JobRequested) -> JobId:
    job_id, tenant = new_id(), platform.tenants[0]
    await platform.log.append("job-requests", 0, [(tenant.encode(), event_bytes(request, tenant, event_id=job_id))])
    return job_id


async def result_of(platform: Platform, job_id: str) -> JobFinished:
    def its_results(records: list[Record]) -> list[JobFinished]:
        bodies = [decode(record.value).data for record in records]
        return [body for body in bodies if isinstance(body, JobFinished) and body.job_id == job_id]

    (result,) = its_results(await platform.log.until("job-results", lambda records: bool(its_results(records))))
    return result


def dispatched(records: list[Record], job_id: str) -> list[int]:
    bodies = [decode(record.value).data for record in records]
    return [body.attempt for body in bodies if isinstance(body, JobDispatched) and body.job_id == job_id]
