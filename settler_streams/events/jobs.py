"""Events in the life of a job, from the request to the result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from settler_streams.events.fields import (
    Cell,
    Count,
    Int64,
    JobStatus,
    LongText,
    Micros,
    Millis,
    Name,
    PartitionNumber,
    Positive,
    QueuePriority,
    QuotaType,
    RejectReason,
    Text,
    Uuid,
)
from settler_streams.events.structs import Part, event, part


@part
class FileRecords(Part):
    """A record set in a file. ``path`` is relative to the tenant's own directory."""

    source: Literal["file"] = "file"
    path: Text
    format: Annotated[str, Field(pattern="^(csv|jsonl|parquet)$")]


@part
class InlineRecords(Part):
    """A record set carried in the event itself, up to the message limit of the topic."""

    source: Literal["inline"] = "inline"
    rows: tuple[dict[Cell, Cell], ...]


Records = Annotated[FileRecords | InlineRecords, Field(discriminator="source")]


@part
class MatchRules(Part):
    """When a left row and a right row (or several) belong together.

    ``keys`` must be equal; amounts may differ by ``amount_tolerance_minor`` (minor units of the currency), dates by
    ``date_window_days``. ``one_to_many`` lets one left row settle up to ``group_size_max`` right rows.
    """

    keys: Annotated[tuple[Cell, ...], Field(max_length=8)] = ("reference",)
    amount_tolerance_minor: Annotated[int, Field(ge=0, le=10**12)] = 0
    date_window_days: Annotated[int, Field(ge=0, le=3660)] = 3
    currency_must_match: bool = True
    mode: Annotated[str, Field(pattern="^(one_to_one|one_to_many)$")] = "one_to_one"
    group_size_max: Annotated[int, Field(ge=2, le=16)] = 8


@event("settler.job.requested.v1")
class JobRequested(Part):
    """A producer asks for a job. The envelope's ``id`` is the job's id: the same (source, id) again is the same job."""

    kind: Name = "reconciliation"
    priority: QueuePriority = QueuePriority.NORMAL
    user_id: Uuid | None = None
    estimated_cost_us: Annotated[int, Field(ge=1, le=86_400_000_000)] | None = None
    left: Records
    right: Records
    rules: MatchRules


@event("settler.job.cancel-requested.v1")
class JobCancelRequested(Part):
    """A producer no longer wants a job; what has finished stays finished."""

    job_id: Uuid
    reason: Text = ""


@part
class RecordRef(Part):
    """Where a record lies in Kafka: the claim check that spares copying a request through every topic."""

    topic: Text
    partition: PartitionNumber
    offset: Count


@event("settler.job.decided.v1")
class JobDecided(Part):
    """Admission's only answer to a request: admitted, or rejected with the reason and what would help.

    ``quota``, ``current`` and ``limit`` are given when a quota refused; ``retry_after_ms`` when waiting helps.
    """

    job_id: Uuid
    admitted: bool
    kind: Name
    priority: QueuePriority
    requested_at_ms: Millis
    decided_at_ms: Millis
    reason: RejectReason | None = None
    quota: QuotaType | None = None
    current: Count | None = None
    limit: Count | None = None
    retry_after_ms: Millis | None = None


@part
class EnqueuedJob(Part):
    """One admitted job. ``offset`` is where its request lies; ``traceparent`` is the request's trace context."""

    job_id: Uuid
    kind: Name
    priority: QueuePriority
    estimated_cost_us: Positive
    requested_at_ms: Millis
    offset: Count
    traceparent: Text | None = None


@event("settler.pool.jobs-enqueued.v1")
class JobsEnqueued(Part):
    """Admitted jobs of one tenant enter their worker pool's log; published in the same transaction as their decisions.

    Their requests lie in ``topic`` and ``partition``: the claim check that spares copying them through every topic.
    """

    root_tenant: Uuid
    topic: Text
    partition: PartitionNumber
    jobs: Annotated[tuple[EnqueuedJob, ...], Field(min_length=1, max_length=500)]


@event("settler.job.enqueued.v1")
class JobEnqueued(Part):
    """An admitted job enters its worker pool's log; published in the same transaction as its decision."""

    # Earlier versions have written it; it is read as ever, and what is written is JobsEnqueued.

    job_id: Uuid
    root_tenant: Uuid
    kind: Name
    priority: QueuePriority
    estimated_cost_us: Positive
    requested_at_ms: Millis
    request: RecordRef


@event("settler.job.dispatched.v1")
class JobDispatched(Part):
    """The scheduler hands one attempt at a job to one incarnation of an executor."""

    job_id: Uuid
    attempt: Positive
    executor: Text
    incarnation: Uuid
    kind: Name
    request: RecordRef


@event("settler.job.attempt-finished.v1")
class AttemptFinished(Part):
    """An executor reports one attempt; its result rows are already in Postgres, keyed by job and attempt."""

    job_id: Uuid
    attempt: Positive
    incarnation: Uuid
    status: JobStatus
    worker_us: Micros
    matches: Count = 0
    unmatched: Count = 0
    reason: Name | None = None
    detail: LongText = ""


@event("settler.job.finished.v1")
class JobFinished(Part):
    """The only result of an admitted job; readers see the result rows of ``attempt`` alone."""

    job_id: Uuid
    status: JobStatus
    attempt: Count
    kind: Name
    requested_at_ms: Millis
    finished_at_ms: Millis
    worker_us: Micros
    matches: Count = 0
    unmatched: Count = 0
    executor: Text = ""
    reason: Name | None = None
    detail: LongText = ""


@event("settler.pool.tenant-weighted.v1")
class TenantWeighted(Part):
    """Admission tells a pool what a tenant's tier means there; it re-weights the tenant's backlog at once."""

    weight: Positive
    enterprise: bool
    max_running: Positive
    version: Count


@event("settler.pool.cancel-requested.v1")
class PoolCancelRequested(Part):
    """Admission forwards a cancellation to the pool in which the job waits or runs."""

    job_id: Uuid
    reason: Text = ""


@event("settler.executor.joined.v1")
class ExecutorJoined(Part):
    """A new incarnation of an executor offers its slots; an older incarnation of the same name is gone."""

    executor: Text
    incarnation: Uuid
    slots: Annotated[int, Field(ge=1, le=256)]


@event("settler.executor.heartbeat.v1")
class ExecutorHeartbeat(Part):
    """The incarnation is alive and still runs these jobs; it renews its lease."""

    executor: Text
    incarnation: Uuid
    running: tuple[Uuid, ...] = ()


@event("settler.executor.draining.v1")
class ExecutorDraining(Part):
    """The incarnation takes no more jobs and goes on with these; any other placed on it returns at no cost."""

    executor: Text
    incarnation: Uuid
    running: tuple[Uuid, ...] = ()


@event("settler.executor.left.v1")
class ExecutorLeft(Part):
    """The incarnation has stopped; whatever it had not reported returns to the queue."""

    executor: Text
    incarnation: Uuid


@event("settler.clock.tick.v1")
class ClockTick(Part):
    """Time as a record: the broker's LogAppendTime on it moves the fold's ``now`` when nothing else arrives."""

    role: Name
    sequence: Int64 = 0
