"""The scheduler: which job runs next, on which executor, and when a job is over.

One instance holds one worker pool. Tenants take turns by weighted fair queueing (:mod:`.fair_queue`); executors hold
slots under leases (:mod:`.leases`). Only here does a job end, and only by an event in this fold's own log: the first
report of a job is its result, whichever attempt it is from; later ones change nothing. Its state, by key prefix:

========  =====================================================================================================
pool      virtual times of the lanes, and the number of the last arrival
contract  what each tenant is entitled to in this pool
share     where each tenant with work stands in the fair order
job       one waiting or running job
lease     one executor: its incarnation, its slots, the jobs placed on it
erased    a tenant that was erased: nothing else is kept of it
========  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from settler_streams.core.arrivals import Arrival, arrival_of, arrivals_of
from settler_streams.core.erasure import Erased, erased_tenants, forgotten
from settler_streams.core.fair_queue import FairQueue
from settler_streams.core.fold import NOTHING, Emit, FoldClock, FoldLogic, Outcome, Record, State, Value, value_of
from settler_streams.core.leases import EndedLease, ExecutorLease, Roster
from settler_streams.core.pool_jobs import PoolJob, result_of, unattempted_end, with_queued
from settler_streams.core.pool_values import Contract, Dispatch, PoolClock, QueuedJob, TenantShare
from settler_streams.errors import RecordError
from settler_streams.events import (
    AttemptFinished,
    ClockTick,
    ExecutorDraining,
    ExecutorHeartbeat,
    ExecutorJoined,
    ExecutorLeft,
    JobDispatched,
    JobEnqueued,
    JobFinished,
    JobsEnqueued,
    JobStatus,
    PoolCancelRequested,
    QueuePriority,
    TenantErased,
    TenantWeighted,
)
from settler_streams.ids import JobId, TenantId, derived_id

LEASE_MS = 10_000
"""An executor that has not been heard of for this long is gone; it sends a heartbeat every two seconds."""
ATTEMPTS_MAX = 5
"""A job whose attempts were all lost to executors is given up: it is more likely the cause than the victim."""
MEASURED_US_MAX = 30 * 86_400_000_000
"""What one attempt is charged at most, thirty days: tags are stored in 64 bits, and a report may say anything."""
RETRIED_REASONS = frozenset({"unavailable", "worker_crashed"})
"""Failures that another attempt may not meet; every other failure is the job's result."""
_ERASED = ("tenant_erased", "the tenant was erased")
_PRIORITY = {
    QueuePriority.LOW: 0,
    QueuePriority.NORMAL: 1,
    QueuePriority.HIGH: 2,
    QueuePriority.CRITICAL: 3,
}


class PoolState(Value, frozen=True, array_like=True):
    """The pool's own values; the last tick by its ticker and number."""

    clock: PoolClock
    arrivals: int
    ticker: str = ""
    tick: int = 0


class TenantContract(Value, frozen=True, array_like=True):
    """A tenant's contract, as of the tenant's ``version``."""

    version: int
    contract: Contract


class Share(Value, frozen=True, array_like=True):
    """Where a tenant stands."""

    share: TenantShare


class Lease(Value, frozen=True, array_like=True):
    """An executor's lease."""

    lease: ExecutorLease


class Scheduler(FoldLogic):
    """The scheduler fold of one worker pool."""

    kinds: ClassVar[dict[str, type[Value]]] = {
        "clock": FoldClock,
        "pool": PoolState,
        "contract": TenantContract,
        "share": Share,
        "job": PoolJob,
        "lease": Lease,
        "erased": Erased,
    }

    def __init__(self, state: State, partition: int, reserved_per_mille: int) -> None:
        self._state = state
        self._partition = partition
        pool = value_of(state, "pool/", PoolState)
        self._arrivals = pool.arrivals if pool else 0
        self._tick = (pool.ticker, pool.tick) if pool else ("", 0)
        self._roster = Roster(v.lease for v in state.values() if isinstance(v, Lease))
        self._queue = FairQueue.restore(
            pool.clock if pool else PoolClock(slots=0),
            [v.share for v in state.values() if isinstance(v, Share)],
            [v.queued for v in state.values() if isinstance(v, PoolJob)],
            reserved_per_mille,
        )
        self._stored = pool or PoolState(self._queue.clock, 0)
        self._new_jobs: dict[JobId, PoolJob] = {}
        self._now_ms: int | None = None
        """The clock of the step's last record."""
        self._erased = erased_tenants(state)

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Decide on one record; see :class:`~settler_streams.core.fold.FoldLogic`."""
        self._now_ms = now_ms
        emits: list[Emit] = []
        match record.event.data:
            case JobsEnqueued() as enqueued:
                emits += self._enqueue(record, arrivals_of(enqueued), now_ms)
            case JobEnqueued() as job:
                emits += self._enqueue(record, [arrival_of(job, record.traceparent)], now_ms)
            case AttemptFinished() as report:
                emits += self._reported(record.event.tenantid, report, now_ms)
            case TenantWeighted() as weighted:
                return self._weighted(record, weighted)
            case TenantErased() as erased:
                return self._erase(record, erased, now_ms)
            case PoolCancelRequested() as cancel:
                emits += self._cancel(record, cancel, now_ms)
            case ExecutorJoined() as joined:
                ended = self._roster.joined(joined.executor, joined.incarnation, joined.slots, now_ms)
                emits += self._lease_ended([ended] if ended else [], now_ms)
            case ExecutorHeartbeat() as beat:
                emits += self._heartbeat(beat, now_ms)
            case ExecutorDraining() as draining:
                self._drained(draining, now_ms)
            case ExecutorLeft() as left:
                ended = self._roster.left(left.executor, left.incarnation)
                emits += self._lease_ended([ended] if ended else [], now_ms)
            case ClockTick() as tick:
                emits += self._lease_ended(self._roster.expired(now_ms, LEASE_MS), now_ms)
                (ticker, number), self._tick = self._tick, (record.event.source, tick.sequence)
                self._roster.ticked(now_ms, follows=self._tick[0] == ticker and self._tick[1] > number)
            case other:
                raise RecordError("misplaced", f"the scheduler has no use for {other.event_type}")
        return self._outcome(emits)

    def settle(self) -> Outcome:
        """Give every free slot to the job whose turn it is. All arrivals of the step are known by now: a tenant's jobs,
        which come together, do not have the slots before the next one's are in the pool."""
        if self._now_ms is None:
            return NOTHING
        emits = self._fill_slots(self._now_ms)
        self._now_ms = None
        return self._outcome(emits)

    def _outcome(self, emits: Sequence[Emit]) -> Outcome:
        changes = self._drain()
        return Outcome(changes, tuple(emits)) if changes or emits else NOTHING

    def _enqueue(self, record: Record, jobs: Sequence[Arrival], now_ms: int) -> list[Emit]:
        """Let a tenant's jobs wait. The id of another tenant's job ends one: its tenant's reservation must not outlive
        it. So does that of an erased tenant's, as long as an executor has it.

        Raises:
            RecordError: one of them is already in the pool, or nothing is known of the tenant; none was let in.
        """
        tenant = record.event.tenantid
        present = {job.job_id: self._queue.job(job.job_id) for job in jobs}
        doubled = [job_id for job_id, queued in present.items() if queued is not None and queued.tenant == tenant]
        if doubled or len(present) < len(jobs):
            raise RecordError("duplicate-job", f"job {(doubled or list(present))[0]} is already in the pool")
        contract = value_of(self._state, f"contract/{tenant}", TenantContract)
        if contract is None and tenant not in self._erased:
            raise RecordError("unknown-tenant", f"no weight is known for tenant {tenant}")
        ended: list[Emit] = []
        for job in jobs:
            queued = QueuedJob(tenant, job.job_id, _PRIORITY[job.priority], self._arrivals + 1, job.estimated_cost_us)
            pool_job = PoolJob(queued, job.root, job.kind, job.request, job.requested_at_ms, job.traceparent)
            if contract is None:
                ended.append(unattempted_end(pool_job, JobStatus.CANCELLED, *_ERASED, now_ms))
            elif present[job.job_id] is not None or self._roster.placement(job.job_id) is not None:
                ended.append(
                    unattempted_end(pool_job, JobStatus.FAILED, "id_taken", "submit it again under another id", now_ms)
                )
            else:
                self._arrivals += 1
                self._new_jobs[job.job_id] = pool_job
                self._queue.enqueue(queued, contract.contract)
        return ended

    def _weighted(self, record: Record, weighted: TenantWeighted) -> Outcome:
        """A change of tier, weight or cap holds for the tenant's whole backlog at once."""
        tenant = record.event.tenantid
        key = f"contract/{tenant}"
        current = value_of(self._state, key, TenantContract)
        if tenant in self._erased or (current is not None and current.version >= weighted.version):
            return NOTHING
        contract = Contract(weighted.weight, weighted.enterprise, weighted.max_running)
        self._queue.set_contract(tenant, contract)
        return Outcome({**self._drain(), key: TenantContract(weighted.version, contract)})

    def _erase(self, record: Record, erased: TenantErased, now_ms: int) -> Outcome:
        """End every job of the tenant, and keep nothing of it. A repetition is answered again, since who asks may have
        missed the answer. The slot of a job that runs stays taken until its executor says more, or goes.
        """
        tenant = record.event.tenantid
        emits: list[Emit] = []
        jobs = {queued.job_id: queued for queued in self._queue.jobs() if queued.tenant == tenant}
        for job_id, queued in sorted(jobs.items()):
            if (job := self._job(job_id)) is not None:
                emits.append(unattempted_end(job, JobStatus.CANCELLED, *_ERASED, now_ms))
            if not self._queue.cancel(tenant, job_id):
                self._queue.finished(job_id, queued.charged_us)
        self._queue.forget(tenant)
        self._erased.add(tenant)
        gone: dict[str, Value | None] = {f"contract/{tenant}": None, f"erased/{tenant}": Erased(erased.version)}
        return Outcome({**self._drain(), **gone}, (*emits, forgotten(record, erased, "scheduler", self._partition)))

    def _reported(self, tenant: TenantId, report: AttemptFinished, now_ms: int) -> Iterable[Emit]:
        """The first report of a job ends it. An attempt that may go better elsewhere is tried again instead.

        An attempt of another tenant, or one that has not begun, is of an earlier job with this id.
        """
        job_id = JobId(report.job_id)
        queued, job = self._queue.job(job_id), self._job(job_id)
        if queued is None or job is None:
            self._roster.released(job_id)  # of a tenant that was erased while it ran
            return
        if queued.tenant != tenant or report.attempt > queued.attempt:
            return
        measured_us = min(report.worker_us, MEASURED_US_MAX)
        retried = report.status is JobStatus.FAILED and report.reason in RETRIED_REASONS
        if retried and (report.attempt < queued.attempt or queued.tries < ATTEMPTS_MAX):
            if self._queue.requeue(job_id, report.attempt, measured_us):
                self._roster.released(job_id)
            return
        placement = self._roster.placement(job_id)
        self._roster.released(job_id)
        self._queue.finished(job_id, measured_us)
        result = JobFinished(
            job_id=job_id,
            status=report.status,
            attempt=report.attempt,
            kind=job.kind,
            requested_at_ms=job.requested_at_ms,
            finished_at_ms=now_ms,
            worker_us=report.worker_us,
            matches=report.matches,
            unmatched=report.unmatched,
            executor=placement.executor if placement and placement.incarnation == report.incarnation else "",
            reason=report.reason,
            detail=report.detail,
        )
        yield result_of(job, result)

    def _cancel(self, record: Record, cancel: PoolCancelRequested, now_ms: int) -> Iterable[Emit]:
        """A waiting job ends at once; a running one ends with its report, as if nobody had asked."""
        job_id = JobId(cancel.job_id)
        job = self._job(job_id)
        if job is not None and self._queue.cancel(record.event.tenantid, job_id):
            yield unattempted_end(job, JobStatus.CANCELLED, "cancelled", cancel.reason, now_ms)

    def _heartbeat(self, beat: ExecutorHeartbeat, now_ms: int) -> list[Emit]:
        """What it should run and does not, others are given first: it may not be able to read."""
        running = tuple(JobId(job_id) for job_id in beat.running)
        answer = self._roster.heartbeat(beat.executor, beat.incarnation, running, now_ms, LEASE_MS)
        if not answer.missing:
            return []
        for job_id in answer.missing:
            self._roster.released(job_id)
        self._return(answer.missing)
        with self._roster.passing_over(beat.executor):
            return self._fill_slots(now_ms)

    def _drained(self, draining: ExecutorDraining, now_ms: int) -> None:
        """What was placed there and is not run goes to the next executor. It was placed before this record: later ones
        place nothing there, so a stop that is told loses no attempt, and no job waits for the lease to end."""
        running = tuple(JobId(job_id) for job_id in draining.running)
        self._return(self._roster.draining(draining.executor, draining.incarnation, running, now_ms))

    def _return(self, job_ids: Iterable[JobId]) -> None:
        """Queue again what an executor that lives has not begun, or no longer runs: that loses no attempt."""
        for job_id in job_ids:
            if (queued := self._queue.job(job_id)) is not None:
                self._queue.requeue(job_id, queued.attempt, spared=True)

    def _lease_ended(self, ended: Iterable[EndedLease], now_ms: int) -> list[Emit]:
        return [emit for lease in ended for emit in self._lost(lease.job_ids, now_ms)]

    def _lost(self, job_ids: Iterable[JobId], now_ms: int) -> list[Emit]:
        """Their executor is gone: back to the front of the queue, or given up after too many attempts."""
        emits: list[Emit] = []
        for job_id in job_ids:
            queued, job = self._queue.job(job_id), self._job(job_id)
            if queued is None or job is None or not queued.running:
                continue
            if queued.tries < ATTEMPTS_MAX:
                self._queue.requeue(job_id, queued.attempt)
                continue
            self._queue.finished(job_id, queued.charged_us)
            detail = f"{ATTEMPTS_MAX} executors were lost while they ran it"
            emits.append(unattempted_end(job, JobStatus.FAILED, "attempts_exhausted", detail, now_ms))
        return emits

    def _fill_slots(self, now_ms: int) -> list[Emit]:
        """Give every free slot to the job whose turn it is."""
        emits: list[Emit] = []
        self._queue.set_slots(self._roster.slots())
        while self._roster.free_slots() > 0 and (dispatch := self._queue.dispatch(now_ms)) is not None:
            emits.append(self._dispatched(dispatch, now_ms))
        return emits

    def _dispatched(self, dispatch: Dispatch, now_ms: int) -> Emit:
        job = self._job(dispatch.job_id)
        placement = self._roster.place(dispatch.job_id, now_ms)
        if job is None or placement is None:
            raise AssertionError(f"{dispatch} without a job or a free slot")
        body = JobDispatched(
            job_id=dispatch.job_id,
            attempt=dispatch.attempt,
            executor=placement.executor,
            incarnation=placement.incarnation,
            kind=job.kind,
            request=job.request,
        )
        return Emit(
            "job-dispatches",
            body,
            dispatch.tenant,
            job.root_tenant,
            "dispatched",
            dispatch.job_id,
            partition=self._partition,
            event_id=derived_id(dispatch.job_id, f"dispatched/{dispatch.attempt}"),
            traceparent=job.traceparent,
        )

    def _job(self, job_id: JobId) -> PoolJob | None:
        return self._new_jobs.get(job_id) or value_of(self._state, f"job/{job_id}", PoolJob)

    def _drain(self) -> dict[str, Value | None]:
        """What this record has changed, one value per key."""
        changed = self._queue.drain_changes()
        changes: dict[str, Value | None] = {}
        for job_id, queued in changed.jobs.items():
            job = self._job(job_id)
            changes[f"job/{job_id}"] = with_queued(job, queued) if job is not None and queued is not None else None
        for tenant, share in changed.tenants.items():
            changes[f"share/{tenant}"] = None if share is None else Share(share)
        for executor, lease in self._roster.drain_changes().items():
            changes[f"lease/{executor}"] = None if lease is None else Lease(lease)
        state = PoolState(self._queue.clock, self._arrivals, *self._tick)
        if state != self._stored:
            changes["pool/"] = self._stored = state
        self._new_jobs = {}
        return changes
