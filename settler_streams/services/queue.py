"""The queue as producers see it: a job goes in with a priority; where it comes out is the scheduler's decision."""

from __future__ import annotations

import time
from dataclasses import dataclass

from settler_streams.events import JobRequested, QueuePriority, TenantTier
from settler_streams.ids import JobId, TenantId, uuid7
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.publisher import EventPublisher


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueItem:
    """A job to queue.

    ``tenant_tier`` is accepted because callers know it, and ignored: the tier stored for the tenant counts, so nobody
    can queue at another tier than its own. ``job_id`` is made up when it is not given.
    """

    tenant_id: TenantId
    request: JobRequested
    job_id: JobId | None = None
    tenant_tier: TenantTier | None = None


class PrioritizedQueue:
    """Publishes job requests. Admission decides on each, the tenant's own tier weighs it, its priority orders it."""

    def __init__(self, publisher: EventPublisher, directory: TenantDirectory) -> None:
        self._publisher = publisher
        self._directory = directory

    async def add(self, item: QueueItem, priority: QueuePriority = QueuePriority.NORMAL) -> JobId:
        """Queue a job; returns its id once the request is stored.

        ``priority`` orders the job among the tenant's own jobs and replaces the request's; it changes nothing between
        tenants. Adding the same ``job_id`` again is the same job.

        Raises:
            NotFoundError: there is no such tenant.
            InvalidRequestError: the request is too large.
            UnavailableError: it is unknown whether the request was stored; add it again with the same ``job_id``.
        """
        root = (await self._directory.find(item.tenant_id)).root_id
        job_id = item.job_id or JobId(uuid7(time.time_ns() // 1_000_000))
        request = with_priority(item.request, priority)
        await self._publisher.publish("job-requests", item.tenant_id, root, request, event_id=job_id)
        return job_id


def with_priority(request: JobRequested, priority: QueuePriority) -> JobRequested:
    """The same request with another priority."""
    return JobRequested(
        kind=request.kind,
        priority=priority,
        user_id=request.user_id,
        estimated_cost_us=request.estimated_cost_us,
        left=request.left,
        right=request.right,
        rules=request.rules,
    )
