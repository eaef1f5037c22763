"""The executor's child processes: each does one job at a time, within a bound of memory and of time.

Every child is a pool of its own, because a pool fails as a whole: a job that takes its process down, or has to be
killed, costs nobody else's attempt.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeVar

from settler_streams.errors import Disposition, SettlerError, UnavailableError
from settler_streams.executor.work import end_with_parent, warm_up

R = TypeVar("R")


class JobTimedOutError(SettlerError):
    """The job took longer than a job may; its process was killed."""

    disposition = Disposition.REFUSE


class JobOutOfMemoryError(SettlerError):
    """The job needed more memory than a job may have."""

    disposition = Disposition.REFUSE


class ChildProcesses:
    """``count`` children. A job waits for an idle one; a child whose job did not end well is replaced.

    Args:
        memory_bytes_max: address space of one child. Only Linux enforces it.
        job_s_max: longest time of one job, counted from when it has a child.
    """

    def __init__(self, count: int, *, memory_bytes_max: int, job_s_max: float) -> None:
        self._memory_bytes_max = memory_bytes_max
        self._job_s_max = job_s_max
        self._children: list[concurrent.futures.ProcessPoolExecutor | None] = [None] * count
        self._idle: asyncio.Queue[int] = asyncio.Queue(count)
        for place in range(count):
            self._idle.put_nowait(place)

    async def start(self) -> None:
        """Let every child do its imports, so that they are not part of the first job."""
        children = [self._child(place) for place in range(len(self._children))]
        await asyncio.gather(*(asyncio.wrap_future(child.submit(warm_up)) for child in children))

    @property
    def processes(self) -> list[BaseProcess]:
        """The children that have been started."""
        return [process for child in self._children if child is not None for process in _processes(child)]

    async def run(self, job: Callable[..., R], *args: object) -> R:
        """Do ``job`` in a child; a cancellation kills it.

        Raises:
            UnavailableError: the system has no process for it now.
            JobTimedOutError, JobOutOfMemoryError: it went beyond a bound.
            BrokenProcessPool: it took its process with it.
            Exception: whatever the job raises.
        """
        place = await self._idle.get()
        done = False
        try:
            result = await self._run_in(place, job, *args)
            done = True
            return result
        finally:
            self._idle.put_nowait(place)
            if not done:
                # The next job makes a new child: what the system refuses then fails that attempt, and not this place.
                child, self._children[place] = self._children[place], None
                _kill(child)

    def close(self) -> None:
        """Kill the children. The interpreter would wait for them at its end, however long their jobs take."""
        for child in self._children:
            _kill(child)

    async def _run_in(self, place: int, job: Callable[..., R], *args: object) -> R:
        try:
            child = self._child(place)
            future = asyncio.wrap_future(child.submit(job, *args))
        except BrokenProcessPool:
            raise
        except (OSError, RuntimeError) as refused:  # a thread that cannot be started is the latter
            raise UnavailableError(f"no process could be started: {refused}") from refused
        (process,) = _processes(child)
        finished, _ = await asyncio.wait([future], timeout=self._job_s_max)
        if not finished:
            future.cancel()
            raise JobTimedOutError(f"the job took longer than {self._job_s_max:g} s")
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            await asyncio.to_thread(child.shutdown)  # from then on the exit code is known
        # What Python cannot allocate is a MemoryError; what Polars cannot allocate aborts the process.
        if isinstance(error, MemoryError) or process.exitcode == -signal.SIGABRT:
            raise JobOutOfMemoryError(f"the job needed more than {self._memory_bytes_max >> 20} MiB") from error
        if error is not None and not isinstance(error, Exception):
            # In this process it would pass every handler and end the executor.
            raise RuntimeError(f"the job raised {type(error).__name__}") from error
        return future.result()

    def _child(self, place: int) -> concurrent.futures.ProcessPoolExecutor:
        child = self._children[place]
        if child is None:
            # Spawned, not forked: Polars' threads do not survive a fork.
            child = self._children[place] = concurrent.futures.ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(self._memory_bytes_max,),
            )
        return child


def _begin(memory_bytes_max: int) -> None:
    """Run once in each child."""
    end_with_parent()
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes_max, memory_bytes_max))


def _processes(child: concurrent.futures.ProcessPoolExecutor) -> list[BaseProcess]:
    return list((child._processes or {}).values())  # noqa: SLF001 - public from Python 3.14 on


def _kill(child: concurrent.futures.ProcessPoolExecutor | None) -> None:
    if child is None:
        return
    processes = _processes(child)
    child.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
