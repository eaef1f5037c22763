"""Arrivals: jobs as they enter a worker pool, whichever event has brought them."""

from __future__ import annotations

from typing import NamedTuple

from settler_streams.events import JobEnqueued, JobsEnqueued, QueuePriority, RecordRef
from settler_streams.ids import JobId


class Arrival(NamedTuple):
    """One job as it enters the pool."""

    job_id: JobId
    root: str
    kind: str
    priority: QueuePriority
    estimated_cost_us: int
    requested_at_ms: int
    request: RecordRef
    traceparent: bytes | None


def arrivals_of(enqueued: JobsEnqueued) -> list[Arrival]:
    """The jobs that a step of admission has let in."""
    root, topic, partition = enqueued.root_tenant, enqueued.topic, enqueued.partition
    return [
        Arrival(
            JobId(job.job_id),
            root,
            job.kind,
            job.priority,
            job.estimated_cost_us,
            job.requested_at_ms,
            RecordRef(topic=topic, partition=partition, offset=job.offset),
            job.traceparent.encode() if job.traceparent is not None else None,
        )
        for job in enqueued.jobs
    ]


def arrival_of(job: JobEnqueued, traceparent: bytes | None) -> Arrival:
    """One job by itself, as earlier versions have published it."""
    return Arrival(
        JobId(job.job_id),
        job.root_tenant,
        job.kind,
        job.priority,
        job.estimated_cost_us,
        job.requested_at_ms,
        job.request,
        traceparent,
    )
