"""The values of one pool: what a fold persists of its fair queue, and what the queue answers."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from settler_streams.errors import InvalidRequestError
from settler_streams.ids import JobId, TenantId

TAG_UNITS_PER_US = 100
"""Tag units per microsecond at weight 1. The tiers' weights (1, 2, 5, 10) divide it, so their tags are exact; another
weight errs by less than 0.01 us per job. A tag fits 64 bits for 2,900 years of work at weight 1 in one busy period."""

CHARGED_US_MAX = 10_000_000
"""The most that an estimate may charge in advance, ten seconds. Alone in its lane, a tenant raises the virtual time by
it, and is refunded later what was too much. So this bounds the credit that it can make for itself, and how much longer
a newcomer waits behind it; what a job costs beyond it is charged when it has been measured."""


class Contract(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a tenant is entitled to in this pool. ``max_running`` None is no cap, 0 a pause.

    Raises:
        InvalidRequestError: a weight below 1 or a negative cap.
    """

    weight: int
    enterprise: bool = False
    max_running: int | None = None

    def __post_init__(self) -> None:
        if self.weight < 1 or (self.max_running is not None and self.max_running < 0):
            raise InvalidRequestError(f"weight must be at least 1 and the cap at least 0, not {self}")


class QueuedJob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One job that the pool holds. The caller fills the first five fields; the queue keeps the rest.

    ``seq`` is unique and grows in arrival order; a greater ``priority`` goes first among the tenant's own jobs.
    ``attempt`` counts dispatches, ``spared`` those of them that do not count as a try. ``charged_us``, ``epoch`` and
    ``contested`` say how the last attempt was charged.
    """

    tenant: TenantId
    job_id: JobId
    priority: int
    seq: int
    estimated_us: int
    attempt: int = 0
    running: bool = False
    charged_us: int = 0
    epoch: int = 0
    contested: bool = False
    dispatched_ms: int = 0
    spared: int = 0

    @property
    def tries(self) -> int:
        """Attempts that count against the job."""
        return self.attempt - self.spared


class TenantShare(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A remembered tenant: its contract, its tags (tag units), and its greatest job so far (estimated or measured)."""

    tenant: TenantId
    contract: Contract
    finish_tag: int
    floor_tag: int
    epoch: int
    job_us_max: int


class PoolClock(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The pool's own values: slots, virtual time per lane (tag units), and who is owed the slot between the shares."""

    slots: int
    standard_virtual_time: int = 0
    enterprise_virtual_time: int = 0
    contested_balance: int = 0


class Dispatch(NamedTuple):
    """``job_id`` takes a slot as its ``attempt``-th try, counted from 1."""

    tenant: TenantId
    job_id: JobId
    attempt: int
    enterprise: bool


class Changes(NamedTuple):
    """What has changed since the last drain; None says that the key is to be deleted."""

    tenants: dict[TenantId, TenantShare | None]
    jobs: dict[JobId, QueuedJob | None]
    clock: PoolClock | None


def queue_key(job: QueuedJob) -> tuple[bool, int, int, JobId]:
    """The order inside one tenant's queue: jobs that lost their executor, then by priority, then by arrival."""
    return job.attempt == 0, -job.priority, job.seq, job.job_id
