"""The scheduler as a black box: each job ends once, whatever executors do, and a restart changes nothing."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.leases import SEEN_TICKS
from settler_streams.core.pool_values import QueuedJob
from settler_streams.core.scheduler import ATTEMPTS_MAX, LEASE_MS, RETRIED_REASONS, Scheduler
from settler_streams.events import (
    AttemptFinished,
    ClockTick,
    EnqueuedJob,
    ExecutorDraining,
    ExecutorHeartbeat,
    ExecutorJoined,
    ExecutorLeft,
    JobCancelRequested,
    JobDispatched,
    JobEnqueued,
    JobFinished,
    JobsEnqueued,
    JobStatus,
    PoolCancelRequested,
    QueuePriority,
    RecordRef,
    TenantErased,
    TenantWeighted,
)
from settler_streams.ids import derived_id
from tests.core.harness import Fold, uid

TENANTS = [uid(name) for name in ("a", "b", "c", "enterprise")]
EXECUTORS = ["x1", "x2", "x3"]
REF = RecordRef(topic="job-requests", partition=3, offset=7)


def new_fold():
    return Fold(lambda state: Scheduler(state, 1, 250), partition=1)


def incarnation(executor, number):
    """Grows with ``number``, as a UUIDv7 grows with each start."""
    return f"00000000-0000-7000-8000-{number:08x}{EXECUTORS.index(executor):04x}"


def weigh(version=1, weight=1, *, enterprise=False, max_running=4):
    return TenantWeighted(weight=weight, enterprise=enterprise, max_running=max_running, version=version)


def arrival(*jobs, priority=QueuePriority.NORMAL, cost_us=1_000):
    """Jobs of one tenant, as a step of admission lets them in."""
    entering = [
        EnqueuedJob(
            job_id=job,
            kind="reconciliation",
            priority=priority,
            estimated_cost_us=cost_us,
            requested_at_ms=5,
            offset=REF.offset + place,
        )
        for place, job in enumerate(jobs)
    ]
    return JobsEnqueued(root_tenant=uid("root"), topic=REF.topic, partition=REF.partition, jobs=tuple(entering))


def report(job, attempt=1, status=JobStatus.SUCCEEDED, reason=None, worker_us=1_000, by=None):
    return AttemptFinished(
        job_id=job,
        attempt=attempt,
        incarnation=by or uid("someone"),
        status=status,
        worker_us=worker_us,
        reason=reason,
    )


def join(executor, number=1, slots=1):
    return ExecutorJoined(executor=executor, incarnation=incarnation(executor, number), slots=slots)


def beat(executor, number=1, running=()):
    return ExecutorHeartbeat(executor=executor, incarnation=incarnation(executor, number), running=tuple(running))


def drains(executor, number=1, running=()):
    return ExecutorDraining(executor=executor, incarnation=incarnation(executor, number), running=tuple(running))


def dispatched(emits):
    return [emit.data for emit in emits if isinstance(emit.data, JobDispatched)]


def finished(emits):
    return [emit.data for emit in emits if isinstance(emit.data, JobFinished)]


class Pool:
    """What any reader of the log can work out: leases, placements, attempts, and which jobs are over."""

    def __init__(self):
        self.leases = {}
        self.jobs = {}
        self.placed = {}
        self.contracts = {}
        self.over = Counter()
        self.taken = []
        self.tick = ("", 0)

    def held(self, executor):
        return [job for job, (on, *_) in self.placed.items() if on == executor]

    def free(self):
        return sum(max(0, slots - len(self.held(executor))) for executor, (_, slots, _) in self.leases.items())

    def take(self, record, now_ms):  # noqa: C901 - one case for each event of the log
        """Follow one input. Returns the ends it must lead to: (job, status, attempt)."""
        match record.event.data:
            case JobsEnqueued() as enqueued if record.event.tenantid in self.contracts:
                for job in enqueued.jobs:
                    if self.jobs.get(job.job_id, [record.event.tenantid])[0] != record.event.tenantid:
                        self.taken.append(job.job_id)
                    elif job.job_id not in self.jobs:
                        self.jobs[job.job_id] = [record.event.tenantid, 0, 0]
            case TenantWeighted() as weighted:
                if weighted.version > self.contracts.get(record.event.tenantid, (0, 0))[0]:
                    self.contracts[record.event.tenantid] = (weighted.version, weighted.max_running)
            case PoolCancelRequested() as cancel:
                job = self.jobs.get(cancel.job_id)
                if job and job[0] == record.event.tenantid and cancel.job_id not in self.placed:
                    return [(cancel.job_id, JobStatus.CANCELLED, job[1])]
            case AttemptFinished() as told:
                return self._reported(record.event.tenantid, told)
            case ExecutorJoined() as joined:
                known = self.leases.get(joined.executor)
                if known is None or joined.incarnation > known[0]:
                    ends = self._lose(self.held(joined.executor))
                    self.leases[joined.executor] = (joined.incarnation, joined.slots, now_ms)
                    return ends
            case ExecutorDraining() as end if self.leases.get(end.executor, ("",))[0] == end.incarnation:
                self.leases[end.executor] = (end.incarnation, 0, now_ms)
                for job in set(self.held(end.executor)) - set(end.running):
                    del self.placed[job]
                    self.jobs[job][2] += 1
            case ExecutorLeft() as left if self.leases.get(left.executor, ("",))[0] == left.incarnation:
                del self.leases[left.executor]
                return self._lose(self.held(left.executor))
            case ExecutorHeartbeat() as alive if self.leases.get(alive.executor, ("",))[0] == alive.incarnation:
                self.leases[alive.executor] = (*self.leases[alive.executor][:2], now_ms)
                for job in set(self.held(alive.executor)) - set(alive.running):
                    _, since_ms, ticks = self.placed[job]
                    if ticks == SEEN_TICKS and now_ms - since_ms >= LEASE_MS:
                        del self.placed[job]
                        self.jobs[job][2] += 1
            case ClockTick():
                dead = [name for name, lease in self.leases.items() if now_ms - lease[2] >= LEASE_MS]
                jobs = [job for name in sorted(dead) for job in self.held(name)]
                for name in dead:
                    del self.leases[name]
                ends = self._lose(jobs)
                last, self.tick = self.tick, (record.event.source, record.event.data.sequence)
                follows = last[0] == self.tick[0] and last[1] < self.tick[1]
                for job, (executor, since_ms, ticks) in self.placed.items():
                    if ticks == 0 or (follows and ticks < SEEN_TICKS):
                        self.placed[job] = (executor, now_ms if ticks + 1 == SEEN_TICKS else since_ms, ticks + 1)
                return ends
        return []

    def _reported(self, tenant, told):
        job = self.jobs.get(told.job_id)
        if job is None or job[0] != tenant or told.attempt > job[1]:
            return []
        if told.status is JobStatus.FAILED and told.reason in RETRIED_REASONS:
            under_way = told.job_id in self.placed and told.attempt == job[1]
            if told.attempt < job[1] or self.tries(told.job_id) < ATTEMPTS_MAX:
                if under_way:
                    del self.placed[told.job_id]
                return []
        return [(told.job_id, told.status, told.attempt)]

    def _lose(self, jobs):
        for job in jobs:
            del self.placed[job]
        return [(job, JobStatus.FAILED, self.jobs[job][1]) for job in jobs if self.tries(job) == ATTEMPTS_MAX]

    def tries(self, job):
        _, attempt, spared = self.jobs[job]
        return attempt - spared

    def check(self, emits, ends, now_ms):
        """The ends are those that had to come, and every dispatch found a free slot of a living executor."""
        taken = [end for end in finished(emits) if end.reason == "id_taken"]
        assert [end.job_id for end in taken] == self.taken, "the id of another tenant's job ends the newcomer alone"
        self.over.update(self.taken)
        self.taken = []
        assert [(end.job_id, end.status, end.attempt) for end in finished(emits) if end not in taken] == ends
        for job, _, _ in ends:
            del self.jobs[job]
            self.placed.pop(job, None)
            self.over[job] += 1
        for one in dispatched(emits):
            known, slots, _ = self.leases[one.executor]
            assert known == one.incarnation
            assert len(self.held(one.executor)) < slots, "beyond the executor's slots"
            tenant, attempt, _ = self.jobs[one.job_id]
            assert one.attempt == attempt + 1
            self.jobs[one.job_id][1] = one.attempt
            assert self.tries(one.job_id) <= ATTEMPTS_MAX
            self.placed[one.job_id] = (one.executor, now_ms, 0)
            assert self.running(tenant) <= self.contracts[tenant][1]
        if self.free() > 0:
            for job, (tenant, *_) in self.jobs.items():
                capped = self.running(tenant) >= self.contracts[tenant][1]
                assert job in self.placed or capped, "a job waits beside a free slot"

    def running(self, tenant):
        return sum(self.jobs[job][0] == tenant for job in self.placed)


jobs = st.integers(0, 14)
arriving = st.lists(jobs, min_size=1, max_size=4, unique=True)
tenants = st.sampled_from(TENANTS)
executors = st.sampled_from(EXECUTORS)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("enqueue"), tenants, arriving, st.sampled_from(QueuePriority), st.sampled_from([1, 10**6, 10**12])
        ),
        st.tuples(st.just("enqueue"), tenants, arriving, st.sampled_from(QueuePriority), st.sampled_from([1, 10**6])),
        st.tuples(st.just("weigh"), tenants, st.integers(1, 5), st.integers(1, 10), st.booleans(), st.integers(1, 3)),
        st.tuples(st.just("join"), executors, st.integers(1, 6), st.integers(1, 3)),
        st.tuples(st.just("beat"), executors, st.integers(1, 6), st.booleans()),
        st.tuples(st.just("drain"), executors, st.integers(1, 6), st.integers(0, 3)),
        st.tuples(st.just("left"), executors, st.integers(1, 6)),
        st.tuples(
            st.just("report"),
            st.integers(0, 40),
            st.sampled_from(JobStatus),
            st.sampled_from([None, "unavailable", "worker_crashed", "bad_input"]),
            st.sampled_from([0, 500, 10**7, 2**63 - 1]),
        ),
        st.tuples(
            st.just("report"),
            st.integers(0, 40),
            st.sampled_from([JobStatus.FAILED, JobStatus.SUCCEEDED]),
            st.sampled_from(["unavailable", "worker_crashed"]),
            st.sampled_from([0, 500]),
        ),
        st.tuples(st.just("cancel"), tenants, jobs),
        st.tuples(st.just("tick"), st.sampled_from("aab"), st.booleans()),
        st.tuples(st.just("misplaced")),
        st.tuples(st.just("later"), st.sampled_from([1, 1_000, LEASE_MS - 1, LEASE_MS])),
        st.tuples(st.just("restart")),
    ),
    max_size=70,
)


def record_of(fold, operation, pool):
    match operation:
        case ("enqueue", tenant, numbers, priority, cost_us):
            entering = [uid(f"j{number}") for number in numbers]
            return fold.record(arrival(*entering, priority=priority, cost_us=cost_us), tenant)
        case ("weigh", tenant, version, weight, enterprise, max_running):
            return fold.record(weigh(version, weight, enterprise=enterprise, max_running=max_running), tenant)
        case ("join", executor, number, slots):
            return fold.record(join(executor, number, slots))
        case ("beat", executor, number, honest):
            return fold.record(beat(executor, number, pool.held(executor) if honest else ()))
        case ("drain", executor, number, running):
            return fold.record(drains(executor, number, pool.held(executor)[:running]))
        case ("left", executor, number):
            return fold.record(ExecutorLeft(executor=executor, incarnation=incarnation(executor, number)))
        case ("report", which, status, reason, worker_us):
            past = fold.emitted(JobDispatched)
            if past:
                emit = past[-1 - which % len(past)]
                one = emit.data
                told = report(one.job_id, one.attempt, status, reason, worker_us, one.incarnation)
                return fold.record(told, emit.tenant)
        case ("cancel", tenant, number):
            return fold.record(PoolCancelRequested(job_id=uid(f"j{number}")), tenant)
        case ("misplaced",):
            return fold.record(JobCancelRequested(job_id=uid("j0")))
        case ("tick", ticker, repeated):
            number = fold.offset - fold.offset % 5 if repeated else fold.offset
            return fold.record(ClockTick(role="scheduler", sequence=number), source=f"/ticker/{ticker}")
    return fold.record(ClockTick(role="scheduler"))


def drain(fold, pool, step):
    """A healthy executor comes and does everything that is left."""
    fold.now_ms += LEASE_MS
    step(fold.record(ClockTick(role="scheduler")))
    step(fold.record(join("x1", 99, 4)))
    for _ in range(200):
        if not pool.placed:
            break
        job = next(iter(pool.placed))
        tenant, attempt, _ = pool.jobs[job]
        step(fold.record(report(job, attempt, by=incarnation("x1", 99)), tenant))
    assert not pool.jobs


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 4), operations)
def test_whatever_executors_do_each_job_ends_once_and_restarts_change_nothing(weighed, sequence):
    fold, restarted, spared = new_fold(), new_fold(), new_fold()
    pool, arrived = Pool(), Counter()

    def step(record):
        restarted.now_ms = spared.now_ms = fold.now_ms
        emits = fold.fold(record)
        is_dead = bool(fold.dead) and fold.dead[-1][0] == record.offset
        ends = [] if is_dead else pool.take(record, fold.now_ms)
        if isinstance(record.event.data, JobsEnqueued) and not is_dead:
            arrived.update(job.job_id for job in record.event.data.jobs)
        pool.check(emits, ends, fold.now_ms)
        restarted.fold(record)
        if not is_dead:
            spared.fold(record)

    for tenant in TENANTS[:weighed]:
        step(fold.record(weigh(enterprise=tenant == TENANTS[3]), tenant))
    for operation in sequence:
        if operation[0] == "later":
            fold.now_ms += operation[1]
        elif operation[0] == "restart":
            restarted.restart()
        else:
            step(record_of(fold, operation, pool))
    drain(fold, pool, step)
    assert pool.over == arrived, "one end for each arrival"
    assert not [key for key in fold.state if key.startswith(("job/", "share/"))], "nothing is left behind"
    for twin in (restarted, spared):
        assert [outcome.emits for outcome in twin.outcomes] == [outcome.emits for outcome in fold.outcomes]
        assert twin.stored() == fold.stored()


# One claim at a time


def ready(*executors_, tenants_=TENANTS[:1]):
    fold = new_fold()
    for tenant in tenants_:
        fold.feed(weigh(), tenant)
    for executor in executors_:
        fold.feed(join(executor))
    return fold


def test_nothing_is_dispatched_while_nobody_has_slots():
    fold = ready()
    assert fold.feed(arrival(uid("j")), TENANTS[0]) == ()
    fold.now_ms += 60_000
    assert fold.feed(ClockTick(role="scheduler")) == ()
    (one,) = dispatched(fold.feed(join("x1")))
    assert (one.job_id, one.executor, one.attempt, one.request) == (uid("j"), "x1", 1, REF)


def test_a_dispatch_and_a_result_are_addressed_and_named_by_their_job():
    fold = ready("x1")
    (sent,) = fold.feed(arrival(uid("j")), TENANTS[0])
    assert (sent.topic, sent.partition, sent.key) == ("job-dispatches", 1, uid("root"))
    assert sent.event_id == derived_id(uid("j"), "dispatched/1")
    fold.now_ms += 9
    (ended,) = fold.feed(report(uid("j"), by=incarnation("x1", 1)), TENANTS[0])
    assert (ended.topic, ended.key, ended.tenant) == ("job-results", uid("root"), TENANTS[0])
    assert ended.event_id == derived_id(uid("j"), "finished")
    assert (ended.data.executor, ended.data.requested_at_ms, ended.data.finished_at_ms) == ("x1", 5, fold.now_ms)


@pytest.mark.parametrize("twice", [True, False])
def test_an_unknown_tenants_or_repeated_arrival_is_a_dead_letter(twice):
    fold = ready() if twice else new_fold()
    fold.feed(arrival(uid("j")), TENANTS[0])
    fold.feed(arrival(uid("j")), TENANTS[0])
    assert fold.reasons() == (["duplicate-job"] if twice else ["unknown-tenant"] * 2)


def test_a_job_under_the_id_of_another_tenants_job_ends_and_changes_nothing_for_the_other():
    """Its tenant would otherwise hold a reservation for ever."""
    fold = ready("x1", tenants_=TENANTS[:2])
    fold.feed(arrival(uid("j")), TENANTS[0])
    (taken,) = fold.feed(arrival(uid("j")), TENANTS[1])
    assert taken.tenant == TENANTS[1]
    assert (taken.data.job_id, taken.data.status, taken.data.reason) == (uid("j"), JobStatus.FAILED, "id_taken")
    ((ended,),) = [[emit for emit in fold.feed(report(uid("j")), TENANTS[0]) if isinstance(emit.data, JobFinished)]]
    assert (ended.tenant, ended.data.status) == (TENANTS[0], JobStatus.SUCCEEDED)
    (again,) = dispatched(fold.feed(arrival(uid("j")), TENANTS[1]))
    assert again.job_id == uid("j")
    assert fold.feed(report(uid("j")), TENANTS[0]) == (), "a late attempt at the job before it, which had its id"
    assert [one.attempt for one in finished(fold.feed(report(uid("j")), TENANTS[1]))] == [1]


def test_a_late_attempt_at_an_earlier_job_of_the_same_id_does_not_end_the_one_that_waits():
    fold = ready("x1")
    fold.feed(arrival(uid("j")), TENANTS[0])
    assert finished(fold.feed(report(uid("j")), TENANTS[0]))
    fold.feed(arrival(uid("other")), TENANTS[0])  # takes the slot
    fold.feed(arrival(uid("j")), TENANTS[0])
    assert fold.feed(report(uid("j")), TENANTS[0]) == (), "none of its own has begun"


def test_a_job_under_the_id_of_an_erased_tenants_job_ends_while_an_executor_has_that_one():
    fold = ready("x1", "x2", tenants_=TENANTS[:2])
    fold.feed(arrival(uid("j")), TENANTS[0])
    fold.feed(TenantErased(version=2, root_id=TENANTS[0]), TENANTS[0])
    (taken,) = finished(fold.feed(arrival(uid("j")), TENANTS[1]))
    assert (taken.status, taken.reason) == (JobStatus.FAILED, "id_taken")
    assert fold.feed(report(uid("j"), by=incarnation("x1", 1)), TENANTS[0]) == (), "of a tenant that is gone"
    (one,) = dispatched(fold.feed(arrival(uid("j")), TENANTS[1]))
    assert (one.job_id, one.attempt) == (uid("j"), 1)


def test_a_silent_executors_job_goes_to_another_and_the_first_report_counts():
    fold = ready("x1")
    fold.feed(arrival(uid("j")), TENANTS[0])
    fold.now_ms += LEASE_MS - 1
    assert fold.feed(ClockTick(role="scheduler")) == ()
    fold.feed(join("x2"))
    fold.now_ms += 1
    (again,) = dispatched(fold.feed(ClockTick(role="scheduler")))
    assert (again.executor, again.attempt) == ("x2", 2)
    (ended,) = finished(fold.feed(report(uid("j"), 1, by=incarnation("x1", 1)), TENANTS[0]))
    assert (ended.attempt, ended.executor) == (1, ""), "the first attempt's executor is no longer known by name"
    assert fold.feed(report(uid("j"), 2, by=incarnation("x2", 1)), TENANTS[0]) == ()


def test_a_draining_executor_gets_no_more_jobs_and_keeps_those_that_it_runs():
    fold = ready()
    fold.feed(join("x1", slots=3))
    for name in ("runs", "on its way"):
        fold.feed(arrival(uid(name)), TENANTS[0])
    assert fold.feed(drains("x1", running=[uid("runs")])) == (), "it has a free slot, and nobody else has one"
    assert fold.feed(arrival(uid("next")), TENANTS[0]) == ()
    fold.restart()
    taken = dispatched(fold.feed(join("x2")))
    assert [(one.job_id, one.executor) for one in taken] == [(uid("on its way"), "x2")], "beside the job that runs"
    for _ in range(3):  # under the lease, which its heartbeats renew
        fold.now_ms += LEASE_MS - 1
        for executor, running in (("x1", "runs"), ("x2", "on its way")):
            assert fold.feed(beat(executor, running=[uid(running)])) == ()
        assert fold.feed(ClockTick(role="scheduler")) == ()
    assert fold.feed(join("x1", slots=3)) == (), "the same incarnation offers nothing any more"
    (ended,) = fold.feed(report(uid("runs"), by=incarnation("x1", 1)), TENANTS[0])
    assert (ended.data.status, ended.data.executor) == (JobStatus.SUCCEEDED, "x1")
    assert fold.feed(ExecutorLeft(executor="x1", incarnation=incarnation("x1", 1))) == ()
    (one,) = dispatched(fold.feed(report(uid("on its way"), 2, by=incarnation("x2", 1)), TENANTS[0]))
    assert (one.job_id, one.executor) == (uid("next"), "x2")


def test_a_job_that_a_draining_executor_has_not_begun_has_lost_no_try():
    fold = ready()
    fold.feed(arrival(uid("j")), TENANTS[0])
    drained = 3 * ATTEMPTS_MAX
    for number in range(1, drained + 1):
        (one,) = dispatched(fold.feed(join("x1", number)))
        assert one.attempt == number, "no number is given twice: rows and dispatches are named by it"
        assert fold.feed(drains("x1", number)) == ()
        fold.restart()
    for number in range(drained + 1, drained + ATTEMPTS_MAX + 1):
        assert len(dispatched(fold.feed(join("x1", number)))) == 1
    (ended,) = finished(fold.feed(join("x1", number + 1)))
    assert (ended.status, ended.reason) == (JobStatus.FAILED, "attempts_exhausted")


def test_what_an_older_incarnation_says_of_its_drain_is_fenced():
    fold = ready()
    fold.feed(join("x1", 2))
    fold.feed(drains("x1", 1))
    assert len(dispatched(fold.feed(arrival(uid("j")), TENANTS[0]))) == 1


def test_a_job_of_an_older_release_is_read_as_one_that_was_never_spared():
    old = msgspec.msgpack.encode([TENANTS[0], uid("j"), 1, 1, 1_000, 2, True, 1_000, 0, False, 5])
    job = msgspec.msgpack.decode(old, type=QueuedJob)
    assert (job.attempt, job.spared, job.tries) == (2, 0, 2)


def test_a_late_failure_of_a_lost_attempt_does_not_end_the_last_one():
    fold = ready()
    fold.feed(arrival(uid("j")), TENANTS[0])
    for number in range(1, ATTEMPTS_MAX + 1):
        (one,) = dispatched(fold.feed(join("x1", number)))
        assert one.attempt == number
    assert fold.feed(report(uid("j"), 2, JobStatus.FAILED, "unavailable"), TENANTS[0]) == ()
    (ended,) = finished(fold.feed(report(uid("j"), ATTEMPTS_MAX), TENANTS[0]))
    assert (ended.status, ended.attempt) == (JobStatus.SUCCEEDED, ATTEMPTS_MAX)


def test_a_job_that_loses_every_executor_is_given_up():
    fold = ready()
    fold.feed(arrival(uid("j")), TENANTS[0])
    for number in range(1, ATTEMPTS_MAX + 1):
        assert len(dispatched(fold.feed(join("x1", number)))) == 1
    (ended,) = finished(fold.feed(join("x1", ATTEMPTS_MAX + 1)))
    assert (ended.status, ended.reason) == (JobStatus.FAILED, "attempts_exhausted")


@pytest.mark.parametrize("reason", sorted(RETRIED_REASONS))
def test_a_failure_that_may_pass_is_tried_again_and_the_last_one_stands(reason):
    fold = ready("x1")
    fold.feed(arrival(uid("j")), TENANTS[0])
    for attempt in range(1, ATTEMPTS_MAX):
        emits = fold.feed(report(uid("j"), attempt, JobStatus.FAILED, reason), TENANTS[0])
        assert [one.attempt for one in dispatched(emits)] == [attempt + 1]
        assert fold.feed(report(uid("j"), attempt, JobStatus.FAILED, reason), TENANTS[0]) == (), "a repeated report"
    (ended,) = finished(fold.feed(report(uid("j"), ATTEMPTS_MAX, JobStatus.FAILED, reason), TENANTS[0]))
    assert (ended.status, ended.reason, ended.attempt) == (JobStatus.FAILED, reason, ATTEMPTS_MAX)


def test_only_a_waiting_job_can_be_cancelled_and_only_by_its_tenant():
    fold = ready("x1", tenants_=TENANTS[:2])
    for name in ("runs", "waits"):
        fold.feed(arrival(uid(name)), TENANTS[0])
    for job, tenant in ((uid("runs"), TENANTS[0]), (uid("waits"), TENANTS[1])):
        assert fold.feed(PoolCancelRequested(job_id=job), tenant) == ()
    (ended,) = finished(fold.feed(PoolCancelRequested(job_id=uid("waits"), reason="r"), TENANTS[0]))
    assert (ended.status, ended.attempt, ended.detail) == (JobStatus.CANCELLED, 0, "r")


def test_a_change_of_weight_moves_the_backlog_at_once_and_an_old_one_nothing():
    fold = ready("x1", tenants_=TENANTS[:2])
    for number in range(6):
        for tenant in TENANTS[:2]:
            fold.feed(arrival(uid(f"{tenant} {number}"), cost_us=1_000_000), tenant)
    fold.feed(weigh(2, 10), TENANTS[1])
    assert fold.feed(weigh(1, 1), TENANTS[1]) == ()
    for _ in range(6):
        running = fold.emitted(JobDispatched)[-1]
        fold.feed(report(running.data.job_id, worker_us=1_000_000), running.tenant)
    served = [emit.tenant for emit in fold.emitted(JobDispatched)]
    assert served[1:].count(TENANTS[1]) >= 5


def test_a_raised_cap_lets_waiting_jobs_run_at_once():
    fold = new_fold()
    fold.feed(weigh(max_running=1), TENANTS[0])
    fold.feed(join("x1", slots=3))
    for number in range(3):
        fold.feed(arrival(uid(f"j{number}")), TENANTS[0])
    assert len(fold.emitted(JobDispatched)) == 1
    assert len(dispatched(fold.feed(weigh(2, max_running=3), TENANTS[0]))) == 2


def ticks(fold, times, ticker="a"):
    """As many of one ticker's; a tick's number grows."""
    return [
        emit
        for _ in range(times)
        for emit in fold.feed(ClockTick(role="scheduler", sequence=fold.offset), source=f"/ticker/{ticker}")
    ]


def test_a_placed_job_that_its_executor_does_not_run_returns_after_a_lease_and_has_lost_no_try():
    """However its executor lost it: from when it could read the dispatch."""
    fold = ready("x1")
    fold.feed(arrival(uid("j")), TENANTS[0])
    for attempt in range(1, 3 * ATTEMPTS_MAX):
        assert ticks(fold, 1) == []
        fold.now_ms += LEASE_MS - 1
        assert fold.feed(beat("x1")) == ()
        assert ticks(fold, 1) == []
        fold.restart()
        fold.now_ms += LEASE_MS - 1
        assert fold.feed(beat("x1")) == ()
        fold.now_ms += 1
        assert [one.attempt for one in dispatched(fold.feed(beat("x1")))] == [attempt + 1]
    ticks(fold, SEEN_TICKS)
    fold.now_ms += LEASE_MS
    assert fold.feed(beat("x1", running=[uid("j")])) == ()
    assert finished(fold.feed(report(uid("j"), attempt + 1), TENANTS[0]))


@pytest.mark.parametrize("owners", [1, 4])
@pytest.mark.parametrize("outage_s", [15, 60, 600])
def test_a_scheduler_that_catches_up_places_each_job_once(outage_s, owners):
    """Its log holds the heartbeats of an outage, during which no executor could be given anything, and a tick of each
    owner that ended before its first commit."""
    fold = new_fold()
    fold.feed(weigh(max_running=9), TENANTS[0])
    fold.feed(join("x1", slots=2))
    names = [uid(f"j{number}") for number in range(6)]
    for job in names:
        fold.feed(arrival(job), TENANTS[0])
    ticks(fold, 3, "first")
    for job in names[:2]:
        fold.feed(report(job, by=incarnation("x1", 1)), TENANTS[0])
    ticks(fold, 1, "first")  # appended before the step with what stands before it is committed
    for owner in range(owners):
        for _ in range(outage_s // 2):
            fold.now_ms += 2_000
            fold.feed(join("x1", slots=2))
            fold.feed(beat("x1"))
        ticks(fold, 1, f"owner {owner}")
        fold.feed(last_tick_again(fold), source=f"/ticker/owner {owner}")  # as Kafka may have it twice
    fold.feed(beat("x1"))
    for _ in range(3 * LEASE_MS // 2_000):  # x1 reads its dispatches and runs them
        fold.now_ms += 2_000
        fold.feed(beat("x1", running=names[2:4]))
        ticks(fold, 1, f"owner {owner}")
    assert [emit.data.job_id for emit in fold.emitted(JobDispatched)] == names[:4]
    assert [emit.data.status for emit in fold.emitted(JobFinished)] == [JobStatus.SUCCEEDED] * 2


def last_tick_again(fold):
    """The last record's tick."""
    return ClockTick(role="scheduler", sequence=fold.offset - 1)


def test_what_an_executor_does_not_run_another_is_given_first():
    fold = ready(tenants_=TENANTS[:1])
    fold.feed(join("x1", slots=3))
    for name in ("a", "b"):
        fold.feed(arrival(uid(name)), TENANTS[0])
    fold.feed(join("x2", slots=1))
    ticks(fold, SEEN_TICKS)
    fold.now_ms += LEASE_MS
    fold.restart()
    again = dispatched(fold.feed(beat("x1")))
    assert [(one.job_id, one.executor) for one in again] == [(uid("a"), "x2"), (uid("b"), "x1")]
    assert fold.feed(join("x2", slots=1)) == ()


def test_any_measurement_that_an_event_can_hold_can_be_stored():
    fold = ready("x1")
    for number in range(4):
        fold.feed(arrival(uid(f"j{number}")), TENANTS[0])
    for number in range(4):
        (ended,) = finished(fold.feed(report(uid(f"j{number}"), worker_us=2**63 - 1), TENANTS[0]))
        assert ended.worker_us == 2**63 - 1
        fold.restart()


def traced(entering, trace):
    jobs = [msgspec.structs.replace(job, traceparent=trace) for job in entering.jobs]
    return msgspec.structs.replace(entering, jobs=tuple(jobs))


def alone(job):
    """One job, as earlier versions have published it."""
    return JobEnqueued(
        job_id=job,
        root_tenant=uid("root"),
        kind="reconciliation",
        priority=QueuePriority.NORMAL,
        estimated_cost_us=1_000,
        requested_at_ms=5,
        request=REF,
    )


@pytest.mark.parametrize("by_itself", [True, False])
def test_the_trace_of_a_request_follows_its_job(by_itself):
    fold = ready("x1")
    entering = alone(uid("j")) if by_itself else traced(arrival(uid("j")), "00-trace-01")
    record = fold.record(entering, TENANTS[0])
    (sent,) = fold.fold(msgspec.structs.replace(record, traceparent=b"00-trace-01" if by_itself else b"00-step-01"))
    fold.restart()
    (ended,) = fold.feed(report(uid("j")), TENANTS[0])
    assert sent.traceparent == ended.traceparent == b"00-trace-01"


def test_a_job_by_itself_enters_as_one_of_many_does():
    one, other = ready("x1"), ready("x1")
    assert one.feed(alone(uid("j")), TENANTS[0]) == other.feed(arrival(uid("j")), TENANTS[0])
    assert one.stored() == other.stored()


def test_jobs_that_enter_together_take_their_turns_in_order_each_with_the_place_of_its_request():
    fold = ready()
    names = [uid(f"j{number}") for number in range(3)]
    fold.feed(arrival(*names), TENANTS[0])
    sent = dispatched(fold.feed(join("x1", slots=3)))
    assert [one.job_id for one in sent] == names
    assert [one.request.offset for one in sent] == [REF.offset, REF.offset + 1, REF.offset + 2]


def test_tenants_whose_jobs_enter_in_one_step_share_its_slots():
    """The first one's come in one event, and do not have every free slot before the other's are known."""
    fold = ready(tenants_=TENANTS[:2])
    fold.feed(join("x1", slots=4))
    arrivals = [
        fold.record(arrival(*(uid(f"{tenant} {number}") for number in range(4))), tenant) for tenant in TENANTS[:2]
    ]
    for record in arrivals:
        outcome = fold.logic.decide(record, fold.now_ms)
        fold.state.apply(outcome.changes)
        assert outcome.emits == ()
    assert Counter(emit.tenant for emit in fold.logic.settle().emits) == dict.fromkeys(TENANTS[:2], 2)
    assert fold.logic.settle().emits == ()


@pytest.mark.parametrize("entering", [("a", "j"), ("a", "a")], ids=["in the pool", "twice"])
def test_of_jobs_that_enter_together_a_repeated_one_lets_none_in(entering):
    fold = ready()
    fold.feed(arrival(uid("j")), TENANTS[0])
    before = fold.stored()
    fold.feed(arrival(*map(uid, entering)), TENANTS[0])
    assert fold.reasons() == ["duplicate-job"]
    assert fold.stored() == before
