"""Erasure in the folds: nothing of the tenant is left, what comes late is refused, and a replay gives the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settler_streams.core.admission import Admission, AdmissionPolicy
from settler_streams.core.fair_queue import FairQueue
from settler_streams.core.flag_commands import FlagCommands
from settler_streams.core.leases import SEEN_TICKS
from settler_streams.core.noise import GRID, NoisyDetector, NoisyNeighbour
from settler_streams.core.pool_values import Contract, QueuedJob
from settler_streams.core.quotas import Usage
from settler_streams.core.scheduler import LEASE_MS, Scheduler
from settler_streams.errors import ConflictError
from settler_streams.events import (
    AttemptFinished,
    ClockTick,
    EnqueuedJob,
    ExecutorHeartbeat,
    ExecutorJoined,
    FlagAction,
    FlagCommand,
    FlagScope,
    FlagState,
    InlineRecords,
    JobCancelRequested,
    JobDecided,
    JobDispatched,
    JobFinished,
    JobRequested,
    JobsEnqueued,
    JobStatus,
    MatchRules,
    PoolCancelRequested,
    QueuePriority,
    RecordRef,
    RejectReason,
    Resource,
    TenantChanged,
    TenantErased,
    TenantForgotten,
    TenantNoisy,
    TenantStatus,
    TenantTier,
    TenantWeighted,
    UsagePartial,
    UsageRecorded,
)
from settler_streams.ids import PLATFORM
from settler_streams.tiers import load_tiers
from tests.core.harness import Fold, uid

ROOT, CHILD, OTHER = (uid(name) for name in ("a root", "its child", "another"))
ROOTS = {ROOT: ROOT, CHILD: ROOT, OTHER: OTHER}
POOLS, PARTITION = 2, 3
VERSION = 9
EXECUTOR, INCARNATION = "x1", "00000000-0000-7000-8000-000000000001"
REF = RecordRef(topic="job-requests", partition=3, offset=7)
ROWS = InlineRecords(rows=())


def admission():
    policy = AdmissionPolicy(load_tiers(), 100, POOLS)
    return Fold(lambda state: Admission(state, policy), partition=PARTITION)


def scheduler():
    return Fold(lambda state: Scheduler(state, 1, 250), partition=1)


def flag_fold():
    return Fold(lambda state: FlagCommands(state, 4), partition=PARTITION)


def feed(fold, data, tenant=PLATFORM, **where):
    return fold.feed(data, tenant, key=where.pop("key", ROOTS.get(tenant, tenant)), **where)


def erase(fold, tenant, **where):
    return feed(fold, TenantErased(version=VERSION, root_id=ROOTS[tenant]), tenant, **where)


def change(tenant, version=1, status=TenantStatus.ACTIVE):
    parent = ROOT if tenant == CHILD else None
    return TenantChanged(
        version=version, slug="s", tier=TenantTier.GROWTH, status=status, root_id=ROOTS[tenant], parent_id=parent
    )


def request():
    return JobRequested(kind="reconciliation", left=ROWS, right=ROWS, rules=MatchRules())


def ended(job):
    return JobFinished(
        job_id=job, status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation", requested_at_ms=0, finished_at_ms=1,
        worker_us=1,
    )  # fmt: skip


def flag_of(user=None, version=1):
    scope = FlagScope.TENANT if user is None else FlagScope.USER
    return FlagState(flag="jobs.reconciliation", scope=scope, version=version, changed_at_ms=0, user_id=user)


def command(user=None):
    scope = FlagScope.TENANT if user is None else FlagScope.USER
    return FlagCommand(flag="f", scope=scope, action=FlagAction.SET, actor="ada", user_id=user)


def job_of(tenant, number):
    return uid(f"job {number} of {tenant}")


def lived_in_admission(fold):
    """Every kind of key for each tenant: itself, usage, two open jobs and one that has ended, flags, remembered ids."""
    for tenant in (ROOT, CHILD, OTHER):
        feed(fold, change(tenant), tenant)
        feed(fold, UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=1_000), tenant)
        feed(fold, UsageRecorded(resource=Resource.CUSTOM_DOMAINS, quantity=2), tenant)
        for number in range(3):
            feed(fold, request(), tenant, event_id=job_of(tenant, number), source=f"/{tenant}")
        feed(fold, ended(job_of(tenant, 0)), tenant)
        for user in (None, "ben"):
            feed(fold, flag_of(user) if user is None else flag_of(user, 2), tenant)
    assert fold.dead == []


def arrival(job, root):
    entering = EnqueuedJob(
        job_id=job, kind="reconciliation", priority=QueuePriority.NORMAL, estimated_cost_us=1_000, requested_at_ms=5,
        offset=REF.offset,
    )  # fmt: skip
    return JobsEnqueued(root_tenant=root, topic=REF.topic, partition=REF.partition, jobs=(entering,))


def lived_in_scheduler(fold):
    """One executor of two slots; each tenant has a job that runs or waits, and one more that waits."""
    feed(fold, ExecutorJoined(executor=EXECUTOR, incarnation=INCARNATION, slots=2))
    for tenant in (CHILD, OTHER):
        feed(fold, TenantWeighted(weight=1, enterprise=False, max_running=4, version=1), tenant)
    for number in range(2):
        for tenant in (CHILD, OTHER):
            feed(fold, arrival(job_of(tenant, number), ROOTS[tenant]), tenant)
    assert len(fold.emitted(JobDispatched)) == 2


def lived_in_flags(fold):
    for tenant in (CHILD, OTHER):
        for user in (None, "ben", "a/b"):
            feed(fold, command(user), tenant)


def mentions(fold, tenant):
    """The stored keys that name the tenant, in their key or their value."""
    return {key for key, value in fold.stored().items() if tenant in key or tenant.encode() in value}


KINDS = [(admission, lived_in_admission), (scheduler, lived_in_scheduler), (flag_fold, lived_in_flags)]


@pytest.mark.parametrize(("new_fold", "live"), KINDS)
def test_nothing_is_left_of_an_erased_tenant_but_that_it_was_erased(new_fold, live):
    fold = new_fold()
    live(fold)
    before = fold.stored()
    assert len(mentions(fold, CHILD)) >= 3
    erase(fold, CHILD)
    assert mentions(fold, CHILD) == {f"erased/{CHILD}"}
    changed = {key for key, value in fold.stored().items() if before.get(key) != value}
    assert not {key for key in changed if OTHER in key or key.startswith(("job/", "jobs/", "flag/", "contract/"))}
    assert {key for key in mentions(fold, OTHER) if not key.startswith("seen/")} <= before.keys()
    fold.restart()
    assert mentions(fold, CHILD) == {f"erased/{CHILD}"}


@pytest.mark.parametrize(("new_fold", "live"), KINDS)
def test_who_waits_for_an_erasure_is_answered_each_time_it_is_asked_for(new_fold, live):
    fold = new_fold()
    live(fold)
    first, second = erase(fold, CHILD), erase(fold, CHILD)
    for emits in (first, second):
        told = [emit for emit in emits if isinstance(emit.data, TenantForgotten)]
        assert [(emit.topic, emit.tenant, emit.key, emit.data.version) for emit in told] == [
            ("tenant-signals", CHILD, ROOT, VERSION)
        ]
        assert told[0].data.partition == fold.partition
    answers = [{emit.suffix for emit in emits if not emit.event_id} for emits in (first, second)]
    assert answers[0].isdisjoint(answers[1]), "the relay may publish one event twice"
    assert len(fold.emitted(JobFinished)) == (2 if new_fold is scheduler else 0), "nothing ends twice"


@pytest.mark.parametrize(("new_fold", "live"), KINDS)
def test_a_tenant_that_the_fold_does_not_know_is_erased_all_the_same(new_fold, live):
    fold = new_fold()
    assert any(isinstance(emit.data, TenantForgotten) for emit in erase(fold, CHILD))
    assert fold.dead == []
    assert mentions(fold, CHILD) == {f"erased/{CHILD}"}


def late_records(new_fold):
    if new_fold is admission:
        used = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=5)
        return [
            change(CHILD, 5), change(CHILD, VERSION + 5), used, flag_of("ben", 7), ended(job_of(CHILD, 1)),
            JobCancelRequested(job_id=job_of(CHILD, 2)), request(),
        ]  # fmt: skip
    if new_fold is scheduler:
        return [
            TenantWeighted(weight=1, enterprise=True, max_running=1, version=VERSION + 5),
            PoolCancelRequested(job_id=job_of(CHILD, 1)), arrival(uid("late"), ROOT),
        ]  # fmt: skip
    return [command(), command("ben")]


@pytest.mark.parametrize(("new_fold", "live"), KINDS)
def test_what_comes_late_does_not_bring_the_tenant_back(new_fold, live):
    fold = new_fold()
    live(fold)
    erase(fold, CHILD)
    before, told = fold.stored(), len(fold.outcomes)
    for data in late_records(new_fold):
        feed(fold, data, CHILD)
    assert fold.stored() == before
    assert fold.dead == []
    emits = [emit.data for outcome in fold.outcomes[told:] for emit in outcome.emits]
    if new_fold is admission:
        assert [(each.admitted, each.reason) for each in emits] == [(False, RejectReason.UNKNOWN_TENANT)]
    elif new_fold is scheduler:
        assert [(type(each), each.job_id, each.status) for each in emits] == [
            (JobFinished, uid("late"), JobStatus.CANCELLED)
        ]
    else:
        assert emits == []


@pytest.mark.parametrize(("new_fold", "live"), KINDS)
@given(seed=st.sets(st.integers(0, 40), max_size=20), late=st.permutations(range(11)))
def test_a_replay_with_other_owners_gives_the_same(new_fold, live, seed, late):
    straight, restarted = new_fold(), new_fold()
    for fold in (straight, restarted):
        live(fold)
    script = [(TenantErased(version=VERSION, root_id=ROOT), CHILD)]
    script += [(data, CHILD) for data in late_records(new_fold)]
    if new_fold is admission:
        script += [(ClockTick(role="admission", sequence=1), PLATFORM), (request(), OTHER), (request(), ROOT)]
    script = [script[place] for place in late if place < len(script)]
    for number, (data, tenant) in enumerate(script):
        if number in seed:
            restarted.restart()
        for fold in (straight, restarted):
            feed(fold, data, tenant, event_id=uid(f"step {number}"))
        assert restarted.outcomes[-1].emits == straight.outcomes[-1].emits
        assert restarted.stored() == straight.stored()
    assert restarted.reasons() == straight.reasons()


def test_admission_tells_every_pool_and_the_flags_and_frees_what_the_parents_count():
    fold = admission()
    lived_in_admission(fold)
    parent = fold.state[f"usage/{ROOT}"]
    assert isinstance(parent, Usage)
    assert (parent.running, parent.storage_bytes, parent.domains, parent.month_jobs) == (4, 2_000, 4, 6)
    emits = erase(fold, CHILD)
    told = [(emit.topic, emit.partition) for emit in emits if isinstance(emit.data, TenantErased)]
    assert told == [("pool-inputs", 0), ("pool-inputs", 1), ("flag-commands", None)]
    after = fold.state[f"usage/{ROOT}"]
    assert isinstance(after, Usage)
    assert (after.running, after.storage_bytes, after.domains, after.month_jobs) == (2, 1_000, 2, 6)
    for number in range(3):
        feed(fold, ended(job_of(CHILD, number)), CHILD)
    assert fold.state[f"usage/{ROOT}"] == after, "its jobs have ended already"


def test_the_id_of_an_erased_tenants_event_is_not_free_for_another_tenant():
    fold = admission()
    lived_in_admission(fold)
    erase(fold, CHILD)
    fold.restart()
    feed(fold, request(), OTHER, event_id=job_of(CHILD, 0))
    assert fold.reasons() == ["id-conflict"]


def test_every_request_of_an_erased_root_is_decided():
    fold = admission()
    lived_in_admission(fold)
    erase(fold, OTHER)
    decided = feed(fold, request(), OTHER, event_id=uid("late"))
    assert [(emit.data.reason, emit.subject) for emit in decided if isinstance(emit.data, JobDecided)] == [
        (RejectReason.UNKNOWN_TENANT, uid("late"))
    ]


@pytest.mark.parametrize("where", [{"key": OTHER}, {"key": CHILD}])
def test_only_under_its_own_root_a_tenant_can_be_erased(where):
    fold = admission()
    lived_in_admission(fold)
    before = fold.stored()
    assert erase(fold, CHILD, **where) == ()
    assert fold.reasons() == ["foreign-tenant"]
    assert fold.stored() == before


def test_the_platform_is_no_tenant_to_be_erased():
    fold = admission()
    feed(fold, TenantErased(version=1, root_id=PLATFORM))
    assert fold.reasons() == ["foreign-tenant"]


def test_each_job_of_an_erased_tenant_ends_once_and_a_running_one_keeps_its_slot_until_it_is_reported():
    fold = scheduler()
    lived_in_scheduler(fold)
    running = [emit.data.job_id for emit in fold.emitted(JobDispatched) if emit.tenant == CHILD]
    assert running == [job_of(CHILD, 0)]
    erase(fold, CHILD)
    results = [(emit.data.job_id, emit.data.status, emit.tenant) for emit in fold.emitted(JobFinished)]
    assert results == [(job, JobStatus.CANCELLED, CHILD) for job in sorted(job_of(CHILD, n) for n in range(2))]
    assert len(fold.emitted(JobDispatched)) == 2, "the executor still works on it"
    fold.restart()
    late = AttemptFinished(
        job_id=running[0], attempt=1, incarnation=INCARNATION, status=JobStatus.SUCCEEDED, worker_us=1_000
    )
    feed(fold, late, CHILD)
    assert [emit.data.job_id for emit in fold.emitted(JobDispatched)][2:] == [job_of(OTHER, 1)]
    assert len(fold.emitted(JobFinished)) == 2, "what the attempt says comes too late"
    assert mentions(fold, CHILD) == {f"erased/{CHILD}"}


def test_a_running_job_of_an_erased_tenant_whose_executor_has_forgotten_it_frees_its_slot():
    fold = scheduler()
    lived_in_scheduler(fold)
    erase(fold, CHILD)
    for number in range(1, SEEN_TICKS + 1):
        feed(fold, ClockTick(role="scheduler", sequence=number))
    fold.now_ms += LEASE_MS
    runs = [emit.data.job_id for emit in fold.emitted(JobDispatched) if emit.tenant == OTHER]
    feed(fold, ExecutorHeartbeat(executor=EXECUTOR, incarnation=INCARNATION, running=tuple(runs)))
    assert [emit.data.job_id for emit in fold.emitted(JobDispatched)][2:] == [job_of(OTHER, 1)]
    assert len(fold.emitted(JobFinished)) == 2


def test_the_compacted_flag_state_gets_a_tombstone_for_each_key_that_was_written():
    fold = flag_fold()
    lived_in_flags(fold)
    written = {emit.key for emit in fold.emitted(FlagState) if emit.tenant == CHILD}
    erase(fold, CHILD)
    stones = fold.outcomes[-1].tombstones
    assert {stone.key for stone in stones} == written
    assert {(stone.topic, stone.partition) for stone in stones} == {("flag-state", fold.partition)}
    erase(fold, CHILD)
    assert fold.outcomes[-1].tombstones == ()


def test_the_noisy_neighbour_folds_forget_a_tenant_by_themselves():
    """Their windows end, so they need not be told: what an erased tenant used is gone within a minute."""
    fold, detector = Fold(lambda state: NoisyNeighbour(state, 0)), Fold(lambda state: NoisyDetector(state, 1))
    used = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=100 * 2**20)
    for second in range(60):
        if second < 12:
            feed(fold, used, CHILD, time_ms=fold.now_ms)
            feed(fold, UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=1), OTHER, time_ms=fold.now_ms)
        for emit in feed(fold, ClockTick(role="noise", sequence=second)):
            assert isinstance(emit.data, UsagePartial)
            feed(detector, emit.data)
        feed(detector, ClockTick(role="noise", sequence=second))
        if second == 11:
            assert mentions(fold, CHILD)
            assert mentions(detector, CHILD)
        for each in (fold, detector):
            each.now_ms += 1_000
    assert [emit.tenant for emit in detector.emitted(TenantNoisy)] == [CHILD]
    assert GRID.kept * GRID.width_ms < 60_000
    assert mentions(fold, CHILD) == mentions(detector, CHILD) == set()


def test_a_tenant_with_jobs_in_the_pool_is_not_forgotten():
    queue = FairQueue(1)
    queue.enqueue(QueuedJob(CHILD, job_of(CHILD, 0), 1, 1, 1_000), Contract(1))
    with pytest.raises(ConflictError, match="has jobs in the pool"):
        queue.forget(CHILD)
    queue.forget(OTHER)
    assert queue.cancel(CHILD, job_of(CHILD, 0))
    queue.forget(CHILD)
    assert queue.share(CHILD) is None
