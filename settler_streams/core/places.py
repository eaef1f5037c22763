"""Places: the admitted jobs of a step on their way to their worker pools, those of one tenant in one event.

A pool turns no two tenants' jobs by their arrival, only each tenant's own, and their order is kept. Whatever else is
said to a pool has to come behind what was admitted before it, so it begins with :meth:`Places.take`.
"""

from __future__ import annotations

from settler_streams.core.fold import Emit, Record
from settler_streams.events import EnqueuedJob, JobRequested, JobsEnqueued
from settler_streams.ids import TenantId, derived_id, partition_of

JOBS_MAX = 500
"""Jobs in one event at most, as its schema says: a tenth of what a record may hold."""
DEFAULT_COST_US = 200_000
"""Estimated worker time of a job whose producer gave no estimate; corrected by what it really took."""


class Places:
    """What one step of one partition has admitted and not yet passed on."""

    def __init__(self, pools: int) -> None:
        self._pools = pools
        self._waiting: dict[TenantId, tuple[Record, list[EnqueuedJob]]] = {}
        """By tenant: the first request, and all of their jobs."""

    def pool_of(self, root: str) -> int:
        """A root tenant and its children share one pool, for good: a job and its cancellation meet there."""
        return 0 if self._pools == 1 else partition_of(root, self._pools)

    def add(self, record: Record, request: JobRequested, now_ms: int) -> tuple[Emit, ...]:
        """Let the job that ``record`` asks for enter its pool; returns what has to be published now."""
        tenant, trace = record.event.tenantid, record.traceparent
        waiting = self._waiting.get(tenant)
        if waiting is None:
            waiting = self._waiting[tenant] = record, []
        jobs = waiting[1]
        jobs.append(
            EnqueuedJob(
                job_id=record.event.id,
                kind=request.kind,
                priority=request.priority,
                estimated_cost_us=request.estimated_cost_us or DEFAULT_COST_US,
                requested_at_ms=now_ms,
                offset=record.offset,
                traceparent=trace.decode() if trace is not None else None,
            )
        )
        return () if len(jobs) < JOBS_MAX else (self._enqueued(*self._waiting.pop(tenant)),)

    def take(self) -> tuple[Emit, ...]:
        """Everything that still waits."""
        if not self._waiting:
            return ()
        waiting, self._waiting = self._waiting, {}
        return tuple(self._enqueued(first, jobs) for first, jobs in waiting.values())

    def _enqueued(self, first: Record, jobs: list[EnqueuedJob]) -> Emit:
        root, job_id = first.key, first.event.id
        body = JobsEnqueued(root_tenant=root, topic=first.topic, partition=first.partition, jobs=tuple(jobs))
        return Emit(
            "pool-inputs",
            body,
            first.event.tenantid,
            root,
            "enqueued",
            partition=self.pool_of(root),
            event_id=derived_id(job_id, "enqueued"),
            traceparent=first.traceparent,
        )
