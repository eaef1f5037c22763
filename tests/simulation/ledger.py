"""Books kept beside the log: what admission had to decide, and what became of every job.

Admission is held against an oracle that shares no code with it (``tests/core/admission_oracle.py``): decision by
decision, and counter by counter at the end. The life of a job is followed through the topics alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from settler_streams.core.quotas import Usage, month_bounds
from settler_streams.events import (
    ClockTick,
    EnqueuedJob,
    Envelope,
    FlagState,
    JobDecided,
    JobDispatched,
    JobFinished,
    JobRequested,
    JobsEnqueued,
    Part,
    QueuePriority,
    QuotaType,
    RejectReason,
    TenantChanged,
    TenantTier,
    UsagePartial,
    UsageRecorded,
    decode,
)
from settler_streams.ids import TenantId, partition_of
from settler_streams.tiers import load_tiers
from tests.core.admission_oracle import Oracle, month_of
from tests.simulation.committed import CommittedLog
from tests.simulation.refold import Folded, Refold
from tests.simulation.workload import CHILDREN, PARTITIONS, ROOTS

Report = Callable[[str], None]
WINDOWS_OPEN = 2
"""Of sums: the present one and the one before it may still change."""
OPEN_JOBS_MAX = load_tiers().pool_queue_max // PARTITIONS
ROOT_OF = {**dict(zip(CHILDREN, ROOTS, strict=True)), **{root: root for root in ROOTS}}


class AdmissionBooks:
    """The decisions and counters of one partition, worked out anew from what its fold has read."""

    def __init__(self, refold: Refold, decisions: dict[str, list[Envelope[Part]]], report: Report) -> None:
        self._refold = refold
        self._decisions = decisions
        self._report = report
        self._oracle = Oracle(OPEN_JOBS_MAX)
        self._decided: list[str] = []

    def check(self) -> None:
        """Go through the records in the order in which the fold has met them."""
        for folded in self._refold.folded:
            if folded.record is not None:
                self._check(folded)
        self._check_counters()

    def _check(self, folded: Folded) -> None:
        record, now_ms = folded.record, folded.now_ms
        assert record is not None
        match record.event.data:
            case JobRequested():
                verdict = self._oracle.requested(record, now_ms)
                self._check_decision(folded, verdict)
            case JobFinished() as finished:
                verdict = self._oracle.finished(finished.job_id)
            case UsageRecorded():
                verdict = self._oracle.used(record, now_ms)
            case TenantChanged():
                verdict = self._oracle.changed(record, now_ms)
            case FlagState() as flag:
                verdict = self._oracle.flag(flag)
            case ClockTick():
                verdict = self._oracle.tick(now_ms)
            case _:
                return
        expected = verdict.removeprefix("dead ") if isinstance(verdict, str) and verdict.startswith("dead ") else None
        if folded.refused != expected:
            self._report(f"{_where(folded)}: refused as {folded.refused}, expected {expected}")

    def _check_decision(self, folded: Folded, verdict: str | RejectReason | None) -> None:
        """One decision, the right one, and within every limit at this very moment."""
        assert folded.record is not None
        job_id, tenant = folded.record.event.id, folded.record.event.tenantid
        if isinstance(verdict, str) and not isinstance(verdict, RejectReason):
            return
        decisions = self._decisions.get(job_id, [])
        self._decided.append(job_id)
        if len(decisions) != 1:
            self._report(f"{_where(folded)}: job {job_id} has {len(decisions)} decisions")
            return
        decided = decisions[0].data
        assert isinstance(decided, JobDecided)
        if (decided.admitted, decided.reason) != (verdict is None, verdict):
            self._report(f"{_where(folded)}: job {job_id} got {decided}, expected {verdict or 'admission'}")
        if decisions[0].tenantid != tenant:
            self._report(f"{_where(folded)}: the decision of {tenant} went to {decisions[0].tenantid}")
        if verdict is None:
            self._check_limits(tenant, folded.now_ms)

    def _check_limits(self, tenant: TenantId, now_ms: int) -> None:
        accounts = [self._oracle.accounts[member] for member in self._oracle.chain(tenant)]
        if accounts[0].config.tier is TenantTier.ENTERPRISE:
            return
        for account in accounts:
            used = account.running, account.months[month_of(now_ms)]
            limits = account.limits[QuotaType.CONCURRENT_JOBS], account.limits[QuotaType.MONTHLY_RECONCILIATIONS]
            if used[0] > limits[0] or used[1] > limits[1]:
                self._report(f"{tenant}: {used} jobs are admitted, the limits are {limits}")

    def _check_counters(self) -> None:
        state, now_ms = self._refold.state, self._refold.now_ms
        for tenant, account in self._oracle.accounts.items():
            usage = state.get(f"usage/{tenant}")
            assert isinstance(usage, Usage)
            this_month = usage.month_jobs if usage.month_start_ms == month_bounds(now_ms)[0] else 0
            counted = usage.running, usage.requests, usage.storage_bytes, usage.domains, this_month
            expected = (
                account.running,
                account.requests,
                account.storage,
                account.domains,
                account.months.get(month_of(now_ms), 0),
            )
            if counted != expected:
                self._report(f"{tenant}: the counters are {counted}, an independent fold says {expected}")

    @property
    def decided(self) -> list[str]:
        """The jobs that were decided on, in order."""
        return self._decided


def _where(folded: Folded) -> str:
    return f"{folded.raw.topic}-{folded.raw.partition}@{folded.raw.offset}"


class JobBooks:
    """What the topics say of every job: decided, enqueued, dispatched, finished."""

    def __init__(self, log: CommittedLog, report: Report) -> None:
        self._report = report
        self._decided = log.events("job-decisions", JobDecided)
        self._enqueued = [
            (job, event.tenantid) for event in log.events("pool-inputs", JobsEnqueued) for job in _jobs(event.data)
        ]
        self._dispatched = log.events("job-dispatches", JobDispatched)
        self._finished = log.events("job-results", JobFinished)
        self.decisions: dict[str, list[Envelope[Part]]] = {}
        for event in self._decided:
            self.decisions.setdefault(event.data.job_id, []).append(event)  # type: ignore[attr-defined]

    def check(self) -> None:
        """Nothing lost, nothing doubled, nothing under another tenant, nobody overtaken by his own later job."""
        admitted = {e.data.job_id: e.tenantid for e in self._decided if e.data.admitted}  # type: ignore[attr-defined]
        self._check_once("enqueued", admitted, [(job.job_id, tenant) for job, tenant in self._enqueued])
        finished = [(e.data.job_id, e.tenantid) for e in self._finished]  # type: ignore[attr-defined]
        self._check_once("finished", admitted, finished)
        self._check_attempts(admitted)
        self._check_turns()

    def _check_once(self, what: str, admitted: dict[str, TenantId], jobs: list[tuple[str, TenantId]]) -> None:
        times = Counter(job_id for job_id, _ in jobs)
        for job_id in admitted.keys() | times.keys():
            if times[job_id] != 1 or job_id not in admitted:
                self._report(f"job {job_id} was {what} {times[job_id]} times; admitted: {job_id in admitted}")
        for job_id, tenant in jobs:
            if tenant != admitted.get(job_id):
                self._report(f"job {job_id} of {admitted.get(job_id)} was {what} for {tenant}")

    def _check_attempts(self, admitted: dict[str, TenantId]) -> None:
        attempts: dict[str, int] = {}
        for event in self._dispatched:
            job = event.data
            assert isinstance(job, JobDispatched)
            attempts[job.job_id] = attempts.get(job.job_id, 0) + 1
            if job.attempt != attempts[job.job_id] or event.tenantid != admitted.get(job.job_id):
                self._report(
                    f"dispatch number {attempts[job.job_id]} of job {job.job_id} is {job} for {event.tenantid}"
                )

    def _check_turns(self) -> None:
        """A tenant's jobs of equal priority get their first turn in the order in which they were enqueued."""
        places = {job.job_id: place for place, (job, _) in enumerate(self._enqueued)}
        priorities = {job.job_id: job.priority for job, _ in self._enqueued}
        last: dict[tuple[TenantId, QueuePriority], int] = {}
        for event in self._dispatched:
            job = event.data
            assert isinstance(job, JobDispatched)
            if job.attempt == 1 and job.job_id in places:
                line = event.tenantid, priorities[job.job_id]
                if places[job.job_id] < last.get(line, -1):
                    self._report(f"job {job.job_id} of {event.tenantid} was overtaken by a later one")
                last[line] = places[job.job_id]


def _jobs(body: Part) -> tuple[EnqueuedJob, ...]:
    assert isinstance(body, JobsEnqueued)
    return body.jobs


def check_homes(log: CommittedLog, report: Report) -> None:
    """Whatever concerns a tenant lies under its root's key, in its root's partition."""
    for topic in ("job-decisions", "job-results", "tenant-signals"):
        for raw in log.topic(topic):
            tenant, key = decode(raw.value).tenantid, raw.key.decode()
            if (key, partition_of(key, PARTITIONS)) != (ROOT_OF.get(tenant, tenant), raw.partition):
                report(f"{topic}: an event of {tenant} lies under {key} in {raw.partition}")


def check_windows(log: CommittedLog, report: Report) -> None:
    """Who has told a window says nothing more of those that are closed by then; the detector judges them at once."""
    told: dict[int, int] = {}
    for event in log.events("usage-partials", UsagePartial):
        partial = event.data
        assert isinstance(partial, UsagePartial)
        window = partial.window_start_ms // partial.window_ms
        newest = told[partial.partition] = max(window, told.get(partial.partition, window))
        if window <= newest - WINDOWS_OPEN:
            report(f"usage-partials: partition {partial.partition} tells window {window} after window {newest}")
