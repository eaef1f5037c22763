"""The life of a job, end to end: requested, decided, dispatched, executed, recorded; once each."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest

from settler_streams.events import (
    InlineRecords,
    JobCancelRequested,
    JobDecided,
    JobDispatched,
    JobFinished,
    JobRequested,
    JobStatus,
    MatchRules,
    Part,
    decode,
)
from settler_streams.ids import JobId, TenantId
from settler_streams.settings import Settings
from tests.agents.conftest import Platform
from tests.executor.executors import executor_inside
from tests.runtime.kafka_log import Record
from tests.runtime.requests import ROW, event_bytes, new_id

pytestmark = pytest.mark.services

TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def request() -> JobRequested:
    """Two rows that match, one on the left that does not."""
    left = [{**ROW, "id": f"L{n}", "reference": f"R{n}", "amount": f"{n}.50"} for n in (1, 2, 3)]
    right = [{**ROW, "id": f"X{n}", "reference": f"R{n}", "amount": f"{n}.50"} for n in (1, 2)]
    return JobRequested(
        left=InlineRecords(rows=tuple(left)), right=InlineRecords(rows=tuple(right)), rules=MatchRules()
    )


async def test_a_jobs_result_is_in_postgres_and_for_its_tenant_alone(platform: Platform, settings: Settings) -> None:
    log, (tenant, other), job_id = platform.log, platform.tenants, new_id()
    event = event_bytes(request(), tenant, event_id=job_id)
    async with executor_inside(settings, log, "worker"):
        await log.append("job-requests", 0, [(tenant.encode(), event)], [("traceparent", TRACE)])
        found = await log.until("job-results", lambda records: bool(of(records, job_id, JobFinished)))
    (finished,) = of(found, job_id, JobFinished)
    await recorded(platform, found)

    (job,) = await rows(platform, tenant, "SELECT * FROM jobs WHERE job_id = $1", job_id)
    assert (job["status"], job["decision"], job["accepted_attempt"]) == ("succeeded", "admitted", 1)
    matches = await rows(
        platform, tenant, "SELECT * FROM accepted_matches WHERE job_id = $1 ORDER BY left_amount_minor", job_id
    )
    assert [(m["left_id"], m["right_ids"], m["left_amount_minor"]) for m in matches] == [
        ("L1", ["X1"], 150),
        ("L2", ["X2"], 250),
    ]
    (unmatched,) = await rows(platform, tenant, "SELECT * FROM accepted_unmatched WHERE job_id = $1", job_id)
    assert (unmatched["side"], unmatched["record_id"], unmatched["amount_minor"]) == ("left", "L3", 350)
    (report,) = await rows(platform, tenant, "SELECT * FROM accepted_reports WHERE job_id = $1", job_id)
    assert (report["left_total_minor"], report["right_total_minor"], report["matches"]) == (750, 400, 2)
    assert (finished.matches, finished.unmatched) == (2, 1)
    for table in ("jobs", "executions", "accepted_matches", "accepted_unmatched", "accepted_reports"):
        assert await rows(platform, other, f"SELECT * FROM {table} WHERE job_id = $1", job_id) == [], table
    for topic in ("job-decisions", "pool-inputs", "job-dispatches", "job-results"):
        traced = [dict(r.headers).get("traceparent") for r in await log.read(topic) if job_id.encode() in r.value]
        assert set(traced) - {None} == {TRACE}, topic


async def test_a_request_sent_twice_is_one_job(platform: Platform, settings: Settings) -> None:
    log, tenant, job_id = platform.log, platform.tenants[1], new_id()
    event = event_bytes(request(), tenant, event_id=job_id)
    last = new_id()
    async with executor_inside(settings, log, "twice"):
        await log.append("job-requests", 1, [(tenant.encode(), event)] * 3)
        await log.append("job-requests", 1, [(tenant.encode(), event_bytes(request(), tenant, event_id=last))])
        results = await log.until(
            "job-results", lambda records: all(of(records, job, JobFinished) for job in (job_id, last))
        )
    assert len(of(results, job_id, JobFinished)) == 1
    assert len(of(await log.read("job-decisions"), job_id, JobDecided)) == 1
    assert len(of(await log.read("job-dispatches"), job_id, JobDispatched)) == 1


async def test_a_waiting_job_can_be_cancelled_and_then_ends_once(platform: Platform, settings: Settings) -> None:
    """No executor is there when the request comes; when one joins, there is nothing left to do for it."""
    log, tenant, job_id, last = platform.log, platform.tenants[0], new_id(), new_id()
    await log.append("job-requests", 0, [(tenant.encode(), event_bytes(request(), tenant, event_id=job_id))])
    await log.until("job-decisions", lambda records: bool(of(records, job_id, JobDecided)))
    cancel = JobCancelRequested(job_id=job_id, reason="no longer needed")
    await log.append("job-requests", 0, [(tenant.encode(), event_bytes(cancel, tenant))])
    results = await log.until("job-results", lambda records: bool(of(records, job_id, JobFinished)))
    (finished,) = of(results, job_id, JobFinished)
    assert (finished.status, finished.attempt) == (JobStatus.CANCELLED, 0)

    async with executor_inside(settings, log, "late"):
        await log.append("job-requests", 0, [(tenant.encode(), event_bytes(request(), tenant, event_id=last))])
        results = await log.until("job-results", lambda records: bool(of(records, last, JobFinished)))
    assert len(of(results, job_id, JobFinished)) == 1
    assert of(await log.read("job-dispatches"), job_id, JobDispatched) == []
    await recorded(platform, results)
    (job,) = await rows(platform, tenant, "SELECT * FROM jobs WHERE job_id = $1", job_id)
    assert (job["status"], job["accepted_attempt"]) == ("cancelled", None)


def of(records: list[Record], job_id: JobId, kind: type[Part]) -> list[Any]:
    """The events of one kind about one job."""
    bodies = [decode(record.value).data for record in records]
    return [body for body in bodies if isinstance(body, kind) and body.job_id == job_id]  # type: ignore[attr-defined]


async def recorded(platform: Platform, results: list[Record]) -> None:
    """Wait until the recorder has come past ``results`` and past every decision made so far."""
    decisions = await platform.log.read("job-decisions")
    for topic, records in (("job-results", results), ("job-decisions", decisions)):
        behind = {record.partition: record.offset + 1 for record in sorted(records, key=attrgetter("offset"))}
        await platform.log.until_recorded(platform.pool, "recorder", topic, behind)


async def rows(platform: Platform, tenant: TenantId, query: str, *args: object) -> list[Any]:
    async with platform.pool.tenant(tenant) as transaction:
        return list(await transaction.fetch(query, *args))
