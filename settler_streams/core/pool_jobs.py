"""One job of a pool, from when it enters until its result is published."""

from __future__ import annotations

from settler_streams.core.fold import Emit, Value
from settler_streams.core.pool_values import QueuedJob
from settler_streams.events import JobFinished, JobStatus, RecordRef
from settler_streams.ids import TenantId, derived_id


class PoolJob(Value, frozen=True, array_like=True):
    """A waiting or running job, and what its result needs to say."""

    queued: QueuedJob
    root_tenant: str
    kind: str
    request: RecordRef
    requested_at_ms: int
    traceparent: bytes | None


def with_queued(job: PoolJob, queued: QueuedJob) -> PoolJob:
    """The job as it now stands in the queue."""
    return PoolJob(queued, job.root_tenant, job.kind, job.request, job.requested_at_ms, job.traceparent)


def unattempted_end(job: PoolJob, status: JobStatus, reason: str, detail: str, now_ms: int) -> Emit:
    """The result of a job that no attempt has ended."""
    result = JobFinished(
        job_id=job.queued.job_id,
        status=status,
        attempt=job.queued.attempt,
        kind=job.kind,
        requested_at_ms=job.requested_at_ms,
        finished_at_ms=now_ms,
        worker_us=0,
        reason=reason,
        detail=detail,
    )
    return result_of(job, result)


def result_of(job: PoolJob, result: JobFinished) -> Emit:
    """The event of a job's only result, named after the job."""
    return Emit(
        "job-results",
        result,
        TenantId(job.queued.tenant),
        job.root_tenant,
        "finished",
        result.job_id,
        event_id=derived_id(result.job_id, "finished"),
        traceparent=job.traceparent,
    )
