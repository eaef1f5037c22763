"""Jobs over HTTP: submit, look up, cancel, and page through the result rows of the accepted attempt."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from settler_streams.core.job_requests import rules_of
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.events import JobCancelRequested, JobDecided, JobRequested, RejectReason
from settler_streams.gateway.bodies import event_id_of, idempotency_key, read_event, read_integer
from settler_streams.gateway.operations import gateway_of, principal_of
from settler_streams.gateway.problems import problem, quota_exceeded, unavailable
from settler_streams.ids import JobId, uuid7
from settler_streams.services import QueueItem, queries

if TYPE_CHECKING:
    import asyncpg

DECISION_WITHIN_S = 2.0
"""How long a submission waits for admission; a decision takes some ten milliseconds. Beyond it the answer is 202."""
CONCURRENT_RETRY_MS = 5_000
"""Nobody knows when a running job ends; a client that asks every few seconds does no harm."""
PAGE_ROWS, PAGE_ROWS_MAX = 100, 1000
ROW_NO_MAX = 2**63 - 1

_QUOTA_REASONS = {
    RejectReason.RATE_LIMIT,
    RejectReason.CONCURRENT_JOBS,
    RejectReason.MONTHLY_RECONCILIATIONS,
}
_FORBIDDEN = {
    RejectReason.FLAG_DISABLED: "jobs of this kind are switched off for the tenant",
    RejectReason.TENANT_SUSPENDED: "the tenant or one of its parents is suspended",
}


async def submit(request: Request) -> Response:
    """POST /v1/jobs.

    1. Validate the body by the schema of ``settler.job.requested.v1``, and its rules as the executor will.
    2. A repeated key of a job that was decided gets that decision again.
    3. Listen for the decision, publish the request, wait up to :data:`DECISION_WITHIN_S`.

    A repeated key is recognised for as long as the database knows the job, and until it does, by this process and by
    admission's window of ten minutes. One job has one decision: after a refusal, another key asks anew.
    """
    gateway, principal = gateway_of(request), principal_of(request)
    asked = read_event(JobRequested, await request.body())
    rules_of(asked)
    key = idempotency_key(request)
    tenant_id = principal.tenant_id
    if key is None:
        job_id = JobId(uuid7(time.time_ns() // 1_000_000))
    else:
        job_id = JobId(event_id_of(tenant_id, key))
        known = gateway.decisions.get(tenant_id, job_id) or _decision_of(await _read(request, job_id))
        if known is not None:
            return _answer(job_id, known, repeated=True)
    with gateway.decisions.expect(tenant_id, job_id) as decision:
        repeated = decision.done()  # while the database was asked, which did not know it yet
        if not repeated:
            await gateway.queue.add(QueueItem(tenant_id=tenant_id, job_id=job_id, request=asked), asked.priority)
            await asyncio.wait([decision], timeout=DECISION_WITHIN_S)
        return _answer(job_id, decision.result() if decision.done() else None, repeated=repeated)


async def show(request: Request) -> Response:
    """GET /v1/jobs/{id}, as the projection knows it."""
    job_id = _job_id(request)
    row = await _read(request, job_id)
    decision = gateway_of(request).decisions.get(principal_of(request).tenant_id, job_id)
    if row is None and decision is None:
        raise NotFoundError(f"no job {job_id}")
    body = {"job_id": job_id, "status": "rejected" if decision and not decision.admitted else "admitted"}
    if row is not None:
        body = {name: _plain(value) for name, value in row.items() if value is not None}
    decision = decision or _decision_of(row)
    if decision is not None:
        body["decision"] = msgspec.to_builtins(decision)
    return JSONResponse(body)


async def cancel(request: Request) -> Response:
    """DELETE /v1/jobs/{id}: ask for it; a job that has finished stays finished."""
    gateway, principal, job_id = gateway_of(request), principal_of(request), _job_id(request)
    command = JobCancelRequested(job_id=job_id, reason=f"asked for by {principal.actor}")
    await gateway.publisher.publish("job-requests", principal.tenant_id, principal.root_id, command)
    return JSONResponse({"job_id": job_id, "status": "cancel-requested"}, 202)


async def matches(request: Request) -> Response:
    """GET /v1/jobs/{id}/matches."""
    return await _page(request, queries.READ_MATCHES, "match_no")


async def unmatched(request: Request) -> Response:
    """GET /v1/jobs/{id}/unmatched."""
    return await _page(request, queries.READ_UNMATCHED, "row_no")


async def report(request: Request) -> Response:
    """GET /v1/jobs/{id}/report: one row per currency."""
    job_id, tenant_id = _job_id(request), principal_of(request).tenant_id
    await _require_result(request, job_id)
    async with gateway_of(request).pool.tenant(tenant_id, read_only=True) as tx:
        rows = await tx.fetch(queries.READ_REPORT, tenant_id, job_id)
    return JSONResponse({"items": [dict(row) for row in rows]})


async def _page(request: Request, query: str, number: str) -> Response:
    """A page of result rows, and when there are more its last ``number``, which is the cursor of the next one."""
    job_id, tenant_id = _job_id(request), principal_of(request).tenant_id
    limit = read_integer(request, "limit", PAGE_ROWS, least=1, most=PAGE_ROWS_MAX)
    after = read_integer(request, "cursor", -1, least=-1, most=ROW_NO_MAX)
    await _require_result(request, job_id)
    async with gateway_of(request).pool.tenant(tenant_id, read_only=True) as tx:
        rows = await tx.fetch(query, tenant_id, job_id, after, limit + 1)
    items = [dict(row) for row in rows[:limit]]
    body: dict[str, Any] = {"items": items}
    if len(rows) > limit:
        body["next_cursor"] = str(items[-1][number])
    return JSONResponse(body)


async def _require_result(request: Request, job_id: JobId) -> None:
    row = await _read(request, job_id)
    if row is None:
        raise NotFoundError(f"no job {job_id}")
    if row["accepted_attempt"] is None:
        raise ConflictError(f"job {job_id} is {row['status']}: it has no result rows")


async def _read(request: Request, job_id: JobId) -> asyncpg.Record | None:
    tenant_id = principal_of(request).tenant_id
    async with gateway_of(request).pool.tenant(tenant_id, read_only=True) as tx:
        return await tx.fetchrow(queries.READ_JOB, tenant_id, job_id)


def _job_id(request: Request) -> JobId:
    text = request.path_params["job_id"]
    try:
        canonical = str(uuid.UUID(text))
    except ValueError as error:
        raise NotFoundError("a job's id is a UUID") from error
    if canonical != text:
        raise InvalidRequestError("a job's id is written in lower case with four hyphens")
    return JobId(canonical)


def _decision_of(row: asyncpg.Record | None) -> JobDecided | None:
    """The decision as the projection holds it; a reason that is a quota's name is that quota."""
    if row is None or row["decision"] is None:
        return None
    reason = row["reason"]
    fields = {
        "job_id": str(row["job_id"]),
        "admitted": row["decision"] == "admitted",
        "kind": row["kind"],
        "priority": row["priority"],
        "requested_at_ms": int(row["requested_at"].timestamp() * 1000),
        "decided_at_ms": int(row["decided_at"].timestamp() * 1000),
        "reason": reason,
        "quota": reason if reason in _QUOTA_REASONS else None,
        "current": row["current_usage"],
        "limit": row["limit_value"],
        "retry_after_ms": row["retry_after_ms"],
    }
    return msgspec.convert(fields, JobDecided)


def _answer(job_id: JobId, decision: JobDecided | None, *, repeated: bool = False) -> Response:
    """202, or the refusal. ``repeated`` in the body: decided before, so nothing more will be announced about it."""
    location = f"/v1/jobs/{job_id}"
    if decision is None:
        return JSONResponse({"job_id": job_id, "status": "pending"}, 202, headers={"Location": location})
    told = msgspec.to_builtins(decision)
    if decision.admitted:
        body = {"job_id": job_id, "status": "admitted", "decision": told, "repeated": repeated}
        return JSONResponse(body, 202, headers={"Location": location})
    return _refusal(job_id, decision, told)


def _refusal(job_id: str, decision: JobDecided, told: Any) -> Response:
    members = {"job_id": job_id, "decision": told}
    reason = decision.reason
    if reason in _QUOTA_REASONS:
        used = f"{decision.current} of {decision.limit}"
        wait_ms = decision.retry_after_ms
        if reason is RejectReason.CONCURRENT_JOBS and wait_ms is None:
            wait_ms = CONCURRENT_RETRY_MS
        return quota_exceeded(f"{reason}: {used} used", str(reason), wait_ms, **members)
    if reason in _FORBIDDEN:
        return problem(403, _FORBIDDEN[reason], **members)
    if reason is RejectReason.UNSUPPORTED_KIND:
        return problem(422, f"no executor runs jobs of kind {decision.kind!r}", **members)
    # The pool is full, or admission has not yet heard of a tenant that the database knows.
    return unavailable(f"the job was not admitted: {reason}", **members)


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | bool):
        return value
    return value.isoformat() if isinstance(value, dt.datetime) else str(value)
