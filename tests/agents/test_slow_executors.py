"""Admission goes on whether or not anyone executes: what is admitted waits in Kafka and in its queue."""

from __future__ import annotations

import pytest

from settler_streams.events import JobDecided, JobsEnqueued, decode
from tests.agents.conftest import Platform
from tests.runtime.kafka_log import Record
from tests.runtime.requests import event_bytes, job_request, new_id

pytestmark = pytest.mark.services

JOBS = 300


async def test_without_an_executor_every_request_is_still_decided(platform: Platform) -> None:
    wanted: set[str] = set()
    for partition, tenant in enumerate(platform.tenants):
        jobs = [new_id() for _ in range(JOBS)]
        events = [(tenant.encode(), event_bytes(job_request(), tenant, event_id=job)) for job in jobs]
        await platform.log.append("job-requests", partition, events)
        wanted |= set(jobs)

    decisions = await platform.log.until("job-decisions", lambda records: decided(records).keys() >= wanted)

    assert all(decided(decisions)[job] for job in wanted), "Enterprise is never refused, and the pool has room"
    waiting = places(await platform.log.read("pool-inputs"))
    assert sorted(waiting) == sorted(wanted), "each has its place in the pool, once"
    assert await platform.log.read("job-dispatches") == []
    assert await platform.log.read("dead-letters") == []


def decided(records: list[Record]) -> dict[str, bool]:
    bodies = [decode(record.value).data for record in records]
    return {body.job_id: body.admitted for body in bodies if isinstance(body, JobDecided)}


def places(records: list[Record]) -> list[str]:
    bodies = [decode(record.value).data for record in records]
    return [job.job_id for body in bodies if isinstance(body, JobsEnqueued) for job in body.jobs]
