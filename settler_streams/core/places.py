"""Places: the admitted jobs of a step on their way to their worker pools, those of one tenant in one event.

Tenants take turns by weight and not by arrival, so only the order of each tenant's own jobs counts, and it is kept. Of
what else is said to a pool, a cancellation or an erasure has to come behind the jobs that it is about: it begins with
:meth:`Places.take`. A new weight may come before them.
"""

from __future__ import annotations

from typing import NamedTuple

from settler_streams.core.fold import NO_TRACE, Emit, Record
from settler_streams.events import EnqueuedJob, JobRequested, JobsEnqueued
from settler_streams.ids import TenantId, derived_id, partition_of

JOBS_MAX = 500
"""Jobs in one event at most, as its schema says: 90 to 240 kB, where a record may hold a mebibyte."""
DEFAULT_COST_US = 200_000
"""Estimated worker time of a job whose producer gave no estimate; corrected by what it really took."""


class _Waiting(NamedTuple):
    """One tenant's jobs, and where their requests lie; not the requests, which may hold a mebibyte each."""

    root: str
    topic: str
    partition: int
    jobs: list[EnqueuedJob]


class Places:
    """What one step of one partition has admitted and not yet passed on."""

    def __init__(self, pools: int) -> None:
        self._pools = pools
        self._waiting: dict[TenantId, _Waiting] = {}

    def pool_of(self, root: str) -> int:
        """A root tenant and its children share one pool, for good: a job and its cancellation meet there."""
        return 0 if self._pools == 1 else partition_of(root, self._pools)

    def add(self, record: Record, request: JobRequested, now_ms: int) -> tuple[Emit, ...]:
        """Let the job that ``record`` asks for enter its pool; returns what has to be published now."""
        tenant, trace = record.event.tenantid, record.traceparent
        waiting = self._waiting.get(tenant)
        if waiting is None:
            waiting = self._waiting[tenant] = _Waiting(record.key, record.topic, record.partition, [])
        jobs = waiting.jobs
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
        return () if len(jobs) < JOBS_MAX else self.take(tenant)

    def take(self, tenant: TenantId) -> tuple[Emit, ...]:
        """What still waits of this tenant."""
        waiting = self._waiting.pop(tenant, None)
        return (self._enqueued(tenant, waiting),) if waiting is not None else ()

    def take_all(self) -> tuple[Emit, ...]:
        """What still waits of every tenant."""
        if not self._waiting:
            return ()
        waiting, self._waiting = self._waiting, {}
        return tuple(self._enqueued(tenant, one) for tenant, one in waiting.items())

    def _enqueued(self, tenant: TenantId, waiting: _Waiting) -> Emit:
        root, topic, partition, jobs = waiting
        return Emit(
            "pool-inputs",
            JobsEnqueued(root_tenant=root, topic=topic, partition=partition, jobs=tuple(jobs)),
            tenant,
            root,
            "enqueued",
            partition=self.pool_of(root),
            event_id=derived_id(jobs[0].job_id, "enqueued"),
            traceparent=NO_TRACE,  # each job has its own
        )
