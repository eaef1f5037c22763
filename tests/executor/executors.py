"""Executors for tests: in this process, or as a child process that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from settler_streams.events import ExecutorJoined, decode
from settler_streams.executor.process import Executor
from settler_streams.settings import Settings
from tests.runtime.kafka_log import KafkaLog, Record

STOP_S_MAX = 40.0
"""Running attempts may finish for twenty seconds."""


@asynccontextmanager
async def executor_inside(settings: Settings, log: KafkaLog, name: str) -> AsyncIterator[Executor]:
    """An executor of this process, once it has joined its pool."""
    executor = Executor(settings, log.topology, name=name)
    stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(executor.run(stop))
    try:
        joined = asyncio.create_task(has_joined(log, name))
        await asyncio.wait([task, joined], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            joined.cancel()
            task.result()
        yield executor
    finally:
        if not stop.done():
            stop.set_result(None)
        async with asyncio.timeout(STOP_S_MAX):
            await task


@asynccontextmanager
async def executor_process(settings: Settings, log: KafkaLog, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """An executor with a process group of its own, once it has joined its pool; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "settler_streams.cli.main", "executor", "--name", name,
        env={**os.environ, **settings.environment()},
        stdout=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        await has_joined(log, name)
        yield process
    finally:
        kill_group(process)
        await process.wait()


def kill_group(process: asyncio.subprocess.Process) -> None:
    """SIGKILL the executor and its child processes at once, as a machine that is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def has_joined(log: KafkaLog, name: str) -> None:
    """Wait until the pool's log holds the executor's arrival."""

    def joined(records: list[Record]) -> bool:
        bodies = [decode(record.value).data for record in records if record.key == name.encode()]
        return any(isinstance(body, ExecutorJoined) for body in bodies)

    await log.until("pool-inputs", joined)
