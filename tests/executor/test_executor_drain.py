"""An executor that is told to stop: what it runs may end there, and all else goes to the next one at once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from settler_streams.events import ExecutorDraining, ExecutorHeartbeat, ExecutorLeft, JobStatus, Part, decode
from settler_streams.executor import process as executor_module
from settler_streams.settings import Settings
from tests.agents.conftest import Platform
from tests.executor.executors import executor_inside
from tests.executor.strange_jobs import Held
from tests.executor.test_executor import dispatched, result_of, submit
from tests.runtime.kafka_log import KafkaLog, Record
from tests.runtime.requests import job_request

pytestmark = pytest.mark.services


async def test_a_draining_executor_takes_no_more_and_ends_what_it_runs_under_its_lease(
    platform: Platform, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, marker = platform.log, tmp_path / "marker"
    monkeypatch.setattr(executor_module, "HEARTBEAT_INTERVAL_S", 0.2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(executor_inside(settings, log, "leaving"))
        with monkeypatch.context() as patched:
            patched.setattr(executor_module, "run_job", Held(str(marker)))
            long_one = await submit(platform, job_request(2))
            await until_said(log, "leaving", ExecutorHeartbeat, running=(long_one,))
        leaving = asyncio.create_task(stack.aclose())
        await until_said(log, "leaving", ExecutorDraining, running=(long_one,))
        next_one = await submit(platform, job_request())
        async with executor_inside(settings, log, "staying"):
            finished = await result_of(platform, next_one)
            assert (finished.status, finished.attempt, finished.executor) == (JobStatus.SUCCEEDED, 1, "staying")
            said = await until_said(log, "leaving", ExecutorDraining, count=4)
            assert {word.running for word in said} == {(long_one,)}
            marker.touch()
            await leaving
            finished = await result_of(platform, long_one)
    assert (finished.status, finished.attempt, finished.executor) == (JobStatus.SUCCEEDED, 1, "leaving")
    assert dispatched(await log.read("job-dispatches"), long_one) == [1]


async def test_a_job_that_was_dispatched_and_not_begun_is_run_by_another_before_the_drain_ends(
    platform: Platform, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dispatch is in the log, and the executor is told to stop before it reads it."""
    log, marker = platform.log, tmp_path / "marker"
    async with AsyncExitStack() as stack:
        executor = await stack.enter_async_context(executor_inside(settings, log, "deaf"))
        monkeypatch.setattr(executor_module, "run_job", Held(str(marker)))
        long_one = await submit(platform, job_request())
        await until_said(log, "deaf", ExecutorHeartbeat, running=(long_one,))
        monkeypatch.undo()
        monkeypatch.setattr(executor, "_begin", lambda *_: None)
        in_the_gap = await submit(platform, job_request(3))
        await log.until("job-dispatches", lambda records: dispatched(records, in_the_gap) == [1])
        leaving = asyncio.create_task(stack.aclose())
        async with executor_inside(settings, log, "hearing"):
            finished = await result_of(platform, in_the_gap)
            assert not leaving.done()
            marker.touch()
            await leaving
            await result_of(platform, long_one)
    assert (finished.status, finished.matches, finished.executor) == (JobStatus.SUCCEEDED, 3, "hearing")
    (left,) = await until_said(log, "deaf", ExecutorLeft)
    assert left.incarnation == executor._incarnation


async def until_said(
    log: KafkaLog,
    name: str,
    kind: type[Part],
    *,
    running: tuple[str, ...] | None = None,
    count: int = 1,
) -> list[Part]:
    """Wait for ``count`` words of this kind from an executor (those that name these jobs)."""

    def said(records: list[Record]) -> list[Part]:
        bodies = [decode(record.value).data for record in records if record.key == name.encode()]
        return [b for b in bodies if isinstance(b, kind) and (running is None or b.running == running)]  # type: ignore[attr-defined]

    return said(await log.until("pool-inputs", lambda records: len(said(records)) >= count))
