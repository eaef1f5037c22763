"""Child processes: a job that goes beyond a bound, or takes its process down, costs nobody else anything."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from settler_streams.errors import UnavailableError
from settler_streams.executor.children import ChildProcesses, JobOutOfMemoryError, JobTimedOutError
from tests.executor.strange_jobs import (
    add,
    exit_politely,
    hang,
    leave,
    raise_bug,
    take_memory,
    take_memory_in_polars,
    wait_for,
)

MEMORY_BYTES_MAX = 1024 * 1024 * 1024


@pytest.fixture
def children() -> Iterator[ChildProcesses]:
    children = ChildProcesses(2, memory_bytes_max=MEMORY_BYTES_MAX, job_s_max=120)
    yield children
    children.close()


@pytest.mark.parametrize(
    ("job", "error"),
    [(leave, BrokenProcessPool), (raise_bug, LookupError), (exit_politely, RuntimeError)]
    + [(take_memory, JobOutOfMemoryError), (take_memory_in_polars, JobOutOfMemoryError)] * (sys.platform == "linux"),
)
async def test_a_job_that_ends_badly_ends_alone(
    children: ChildProcesses, tmp_path: Path, job: Callable[..., None], error: type[Exception]
) -> None:
    marker = tmp_path / "marker"
    neighbour = asyncio.create_task(children.run(wait_for, str(marker)))
    for _ in range(2):  # the second finds the first one's place taken again
        with pytest.raises(error):
            await children.run(job)
    assert not neighbour.done()
    marker.touch()
    assert await neighbour == str(marker)
    assert await asyncio.gather(*(children.run(add, n, 1) for n in range(4))) == [1, 2, 3, 4]


async def test_a_job_has_a_deadline() -> None:
    children = ChildProcesses(1, memory_bytes_max=MEMORY_BYTES_MAX, job_s_max=3)
    try:
        await children.start()
        hanging = [psutil.Process(process.pid) for process in children.processes]
        with pytest.raises(JobTimedOutError):
            await children.run(hang)
        assert psutil.wait_procs(hanging, timeout=60)[1] == []
        children._job_s_max = 120  # the next one begins with the imports of a new child
        assert await children.run(add, 1, 1) == 2
    finally:
        children.close()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")],
    ids=["file", "thread"],
)
async def test_a_process_that_the_system_refuses_fails_its_attempt_and_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refused(**_options: object) -> None:
        raise error

    children = ChildProcesses(1, memory_bytes_max=MEMORY_BYTES_MAX, job_s_max=120)
    try:
        with pytest.raises(LookupError):
            await children.run(raise_bug)  # its child is replaced
        with monkeypatch.context() as patched:
            patched.setattr(concurrent.futures, "ProcessPoolExecutor", refused)
            for _ in range(2):
                with pytest.raises(UnavailableError, match=str(error.args[-1])):
                    await children.run(add, 1, 1)
        assert await children.run(add, 1, 1) == 2
    finally:
        children.close()
