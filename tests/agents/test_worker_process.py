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

from settler_streams.events import JobDecided, decode
from settler_streams.topology import load_topology
from tests.runtime.counter import tenant_in
from tests.runtime.kafka_log import KafkaLog, Record
from tests.runtime.requests import event_bytes, job_request, new_id, register

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

pytestmark = [pytest.mark.services, pytest.mark.slow]

PARTITIONS = load_topology().tenant_partitions
BURST = 20
"""Requests of each tenant at a time."""


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
        os.kill(a.pid, signal.SIGKILL)
        await a.wait()

        b = await stack.enter_async_context(worker(settings))
        sent.append(await burst(log))
        await log.until("job-decisions", lambda records: decided(records).keys() >= ids(sent))

        c = await stack.enter_async_context(worker(settings))
        sent.append(await burst(log))
        b.send_signal(signal.SIGTERM)
        sent.append(await burst(log))
        assert await asyncio.wait_for(b.wait(), 30) == 0
        sent.append(await burst(log))
        await log.until("job-decisions", lambda records: decided(records).keys() >= ids(sent))
        c.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(c.wait(), 30) == 0

    decisions = decided(await log.read("job-decisions"))
    assert decisions.keys() == ids(sent)
    assert {job: times for job, times in decisions.items() if times != 1} == {}
    assert await log.read("dead-letters") == []


@asynccontextmanager
async def worker(settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker of the admission role; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "settler_streams.cli.main", "worker", "--roles", "admission",
        env={**os.environ, **settings.environment()},
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def burst(log: KafkaLog) -> list[str]:
    """Requests of every tenant; returns their ids."""
    sent: list[str] = []
    for partition in range(PARTITIONS):
        tenant = tenant_in(partition)
        jobs = [new_id() for _ in range(BURST)]
        events = [(tenant.encode(), event_bytes(job_request(), tenant, event_id=job)) for job in jobs]
        await log.append("job-requests", partition, events)
        sent += jobs
    return sent


def ids(sent: list[list[str]]) -> set[str]:
    return {job for jobs in sent for job in jobs}


def decided(records: list[Record]) -> Counter[str]:
    bodies = [decode(record.value).data for record in records]
    return Counter(body.job_id for body in bodies if isinstance(body, JobDecided))
