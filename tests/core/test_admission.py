"""Admission as a black box: each request one decision, no limit exceeded at any level, and equal after any restart."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from settler_streams.core import dedup
from settler_streams.core.admission import Admission, AdmissionPolicy
from settler_streams.core.dedup import SEEN_WINDOW_MS
from settler_streams.core.open_jobs import Reservations
from settler_streams.core.quotas import Usage
from settler_streams.events import (
    ClockTick,
    FileRecords,
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
    QuotaThreshold,
    QuotaType,
    RecordRef,
    RejectReason,
    Resource,
    TenantAcknowledged,
    TenantChanged,
    TenantErased,
    TenantStatus,
    TenantTier,
    TenantUsage,
    TenantWeighted,
    UsageRecorded,
)
from settler_streams.ids import PLATFORM, derived_id, partition_of
from settler_streams.tiers import load_tiers
from tests.core.admission_oracle import Oracle, month_of
from tests.core.harness import START_MS, Fold, uid

ROOT, CHILD, GRANDCHILD, FLAT, BIG, ORPHAN = (uid(n) for n in ("root", "child", "grandchild", "flat", "big", "orphan"))
PARENTS = {CHILD: ROOT, GRANDCHILD: CHILD, ORPHAN: uid("nobody")}
ROOTS = {CHILD: ROOT, GRANDCHILD: ROOT, ORPHAN: ROOT}
TENANTS = [ROOT, CHILD, GRANDCHILD, FLAT, BIG, ORPHAN]
OPEN_JOBS_MAX = 6
POOLS = 2
DAY_MS = 86_400_000


def new_fold(open_jobs_max=OPEN_JOBS_MAX):
    policy = AdmissionPolicy(load_tiers(), open_jobs_max, POOLS)
    return Fold(lambda state: Admission(state, policy))


def request(kind="reconciliation", **where):
    return JobRequested(
        kind=kind, left=InlineRecords(rows=()), right=InlineRecords(rows=()), rules=MatchRules(), **where
    )


def change(tenant, version=1, tier=TenantTier.STARTER, status=TenantStatus.ACTIVE, quotas=None, burst=None):
    return TenantChanged(
        version=version,
        slug="s",
        tier=tier,
        status=status,
        root_id=ROOTS.get(tenant, tenant),
        parent_id=PARENTS.get(tenant),
        quotas=quotas or {},
        burst=burst,
    )


def finish(job_id):
    return JobFinished(
        job_id=job_id,
        status=JobStatus.SUCCEEDED,
        attempt=1,
        kind="reconciliation",
        requested_at_ms=0,
        finished_at_ms=0,
        worker_us=1,
    )


def flag(version=1, *, enabled=True, killed=False, kind="reconciliation"):
    return FlagState(
        flag=f"jobs.{kind}", scope=FlagScope.GLOBAL, version=version, changed_at_ms=0, enabled=enabled, killed=killed
    )


def key_of(tenant):
    return ROOTS.get(tenant, tenant)


def known(*changes, open_jobs_max=OPEN_JOBS_MAX):
    """A fold that knows the given tenants: ``(tenant, {field: value})``."""
    fold = new_fold(open_jobs_max)
    for tenant, fields in changes:
        fold.feed(change(tenant, **fields), tenant, key=key_of(tenant))
    return fold


def ask(fold, tenant, name, **where):
    """Ask for a job and return its decision, or None if there was none."""
    given_ = {"key": key_of(tenant), "event_id": uid(name)} | where
    body = given_.pop("body", None) or request()
    decided = [emit.data for emit in fold.feed(body, tenant, **given_) if isinstance(emit.data, JobDecided)]
    assert len(decided) <= 1
    return decided[0] if decided else None


def usage_of(fold, tenant):
    value = fold.state[f"usage/{tenant}"]
    assert isinstance(value, Usage)
    return value


# Any sequence of inputs

limits = st.fixed_dictionaries(
    {},
    optional={
        QuotaType.CONCURRENT_JOBS: st.integers(0, 3),
        QuotaType.MONTHLY_RECONCILIATIONS: st.integers(0, 6),
        QuotaType.RATE_LIMIT: st.sampled_from([0, 1, 60, 600]),
        QuotaType.STORAGE: st.integers(0, 100),
        QuotaType.CUSTOM_DOMAINS: st.integers(0, 4),
    },
)
tenants = st.sampled_from(TENANTS)
numbers = st.integers(0, 11)
keys = st.sampled_from([None] * 9 + [FLAT, ""])
requests = st.tuples(
    st.just("request"),
    tenants,
    numbers,
    st.sampled_from(["/a"] * 5 + ["/b"]),
    st.sampled_from(["reconciliation"] * 4 + ["reconciliation-preview", "mystery"]),
    keys,
)
changes = st.tuples(
    st.just("change"),
    tenants,
    st.integers(1, 6),
    st.sampled_from(TenantTier),
    st.sampled_from([TenantStatus.ACTIVE] * 6 + [TenantStatus.SUSPENDED, TenantStatus.DELETED]),
    limits,
    st.sampled_from([None, 1, 2, 5, 10**9]),
)
operations = st.lists(
    st.one_of(
        requests,
        requests,
        requests,
        changes,
        st.tuples(st.just("finish"), numbers),
        st.tuples(
            st.just("use"),
            tenants,
            numbers,
            st.sampled_from(Resource),
            st.sampled_from([1, 3, -2, 50, 2**63 - 1, -(2**63)]),
            keys,
        ),
        st.tuples(st.just("flag"), st.integers(1, 4), st.booleans(), st.booleans()),
        st.tuples(st.just("cancel"), tenants, numbers),
        st.tuples(st.just("tick")),
        st.tuples(st.just("misplaced")),
        st.tuples(st.just("later"), st.sampled_from([1, 20, 999, 60_000, SEEN_WINDOW_MS, 8 * DAY_MS])),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


def record_of(fold, operation):
    match operation:
        case ("request", tenant, number, source, kind, key):
            return fold.record(
                request(kind),
                tenant,
                event_id=uid(f"j{number}"),
                source=source,
                key=key_of(tenant) if key is None else key,
            )
        case ("change", tenant, version, tier, status, quotas, burst):
            return fold.record(change(tenant, version, tier, status, quotas, burst), tenant, key=key_of(tenant))
        case ("finish", number):
            return fold.record(finish(uid(f"j{number}")), ROOT)
        case ("use", tenant, number, resource, quantity, key):
            body = UsageRecorded(resource=resource, quantity=quantity)
            return fold.record(body, tenant, event_id=uid(f"u{number}"), key=key_of(tenant) if key is None else key)
        case ("flag", version, enabled, killed):
            return fold.record(flag(version, enabled=enabled, killed=killed), PLATFORM)
        case ("cancel", tenant, number):
            return fold.record(JobCancelRequested(job_id=uid(f"j{number}")), tenant, key=key_of(tenant))
        case ("misplaced",):
            ref = RecordRef(topic="t", partition=0, offset=0)
            body = JobDispatched(
                job_id=uid("j"), attempt=1, executor="x", incarnation=uid("i"), kind="reconciliation", request=ref
            )
            return fold.record(body)
    return fold.record(ClockTick(role="admission"))


def expected(oracle, record, now_ms):
    match record.event.data:
        case JobRequested():
            return oracle.requested(record, now_ms)
        case TenantChanged():
            return oracle.changed(record, now_ms)
        case JobFinished() as finished:
            return oracle.finished(finished.job_id)
        case UsageRecorded():
            return oracle.used(record, now_ms)
        case FlagState() as state:
            return oracle.flag(state)
        case ClockTick():
            return oracle.tick(now_ms)
        case JobDispatched():
            return "dead misplaced"
    return "nothing"


def answer_of(fold, record, emits):
    if fold.dead and fold.dead[-1][0] == record.offset:
        return f"dead {fold.dead[-1][1].reason}"
    decided = [emit.data for emit in emits if isinstance(emit.data, JobDecided)]
    enqueued = [job for emit in emits if isinstance(emit.data, JobsEnqueued) for job in emit.data.jobs]
    assert len(decided) <= 1
    assert [job.job_id for job in enqueued] == [d.job_id for d in decided if d.admitted], "a place for each admission"
    if not decided:
        return "nothing"
    assert decided[0].job_id == record.event.id
    assert decided[0].admitted == (decided[0].reason is None)
    return decided[0].reason


def assert_state_equals(fold, oracle):
    stored = [job for value in fold.state.values() if isinstance(value, Reservations) for job in value.jobs]
    assert sorted(stored) == sorted(oracle.open), "each open job once"
    for tenant, account in oracle.accounts.items():
        usage = usage_of(fold, tenant)
        assert (usage.running, usage.requests) == (account.running, account.requests)
        assert usage.running == sum(tenant in chain for chain, _ in oracle.open.values())
        assert (usage.storage_bytes, usage.domains) == (account.storage, account.domains)
        if usage.month_start_ms:
            assert usage.month_jobs == account.months.get(month_of(usage.month_start_ms), 0)


@settings(max_examples=250, deadline=None)
@given(st.lists(changes, max_size=6, unique_by=lambda change: change[1]), operations)
@example(  # a dead letter between the end of the ids' window and the next record
    [("change", CHILD, 1, TenantTier.FREE, TenantStatus.ACTIVE, {}, None)],
    [
        *[("request", ROOT, 0, "/a", "reconciliation", None)] * 3,
        ("later", SEEN_WINDOW_MS),
        ("use", CHILD, 0, Resource.REQUESTS, 1, None),
        ("finish", 0),
    ],
)
def test_every_answer_equals_the_oracles_and_neither_restarts_nor_dead_letters_change_anything(first, sequence):
    fold, restarted, spared = new_fold(), new_fold(), new_fold()
    oracle = Oracle(OPEN_JOBS_MAX)
    for operation in first + sequence:
        if operation[0] == "later":
            fold.now_ms += operation[1]
            continue
        if operation[0] == "restart":
            restarted.restart()
            continue
        restarted.now_ms = spared.now_ms = fold.now_ms
        record = record_of(fold, operation)
        emits = fold.fold(record)
        assert answer_of(fold, record, emits) == expected(oracle, record, fold.now_ms), operation
        restarted.fold(record)
        if not (fold.dead and fold.dead[-1][0] == record.offset):
            spared.fold(record)
        assert_state_equals(fold, oracle)
    for twin in (restarted, spared):
        assert [outcome.emits for outcome in twin.outcomes] == [outcome.emits for outcome in fold.outcomes]
        assert twin.stored() == fold.stored()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 6), st.lists(st.integers(0, 2_000), max_size=80), st.sampled_from([ROOT, CHILD])
)
def test_no_window_admits_more_than_burst_and_rate(rate, burst, gaps, limited):
    """Whichever level holds the limit, a window of D ms admits at most burst + rate * D."""
    strict = {"quotas": {QuotaType.RATE_LIMIT: rate}, "burst": burst}
    wide = {"tier": TenantTier.SCALE}
    fold = known(*((t, strict if t == limited else wide) for t in (ROOT, CHILD)), open_jobs_max=1000)
    admitted = []
    for number, gap_ms in enumerate(gaps):
        fold.now_ms += gap_ms
        decided = ask(fold, CHILD, f"j{number}")
        if decided.admitted:
            admitted.append(fold.now_ms)
        else:
            assert decided.reason is RejectReason.RATE_LIMIT
            assert decided.retry_after_ms > 0
    for first, start_ms in enumerate(admitted):
        for count, end_ms in enumerate(admitted[first:], start=1):
            assert count * 60_000 <= burst * 60_000 + rate * (end_ms - start_ms)


# One claim at a time


def test_a_request_is_refused_a_moment_before_its_retry_after_and_admitted_at_it():
    quotas = {QuotaType.RATE_LIMIT: 7}
    early, late = (known((FLAT, {"quotas": quotas, "burst": 1})) for _ in range(2))
    for fold, wait_off_ms, admitted in ((early, -1, False), (late, 0, True)):
        assert ask(fold, FLAT, "a").admitted
        refused = ask(fold, FLAT, "b")
        assert (refused.reason, refused.quota) == (RejectReason.RATE_LIMIT, QuotaType.RATE_LIMIT)
        fold.now_ms += refused.retry_after_ms + wait_off_ms
        assert ask(fold, FLAT, "c").admitted is admitted


def test_an_admission_leads_to_its_decision_and_one_place_that_points_at_the_request():
    fold = known((ROOT, {}), (CHILD, {}))
    record = fold.record(request(), CHILD, topic="job-requests", key=ROOT, event_id=uid("a"))
    decided, enqueued = fold.fold(record)
    assert (decided.topic, decided.key, decided.tenant) == ("job-decisions", ROOT, CHILD)
    assert (enqueued.topic, enqueued.partition, enqueued.key) == ("pool-inputs", partition_of(ROOT, POOLS), ROOT)
    (job,) = enqueued.data.jobs
    assert (enqueued.data.topic, enqueued.data.partition, job.offset) == ("job-requests", 0, record.offset)
    assert job.estimated_cost_us == 200_000
    held = fold.state[f"jobs/{record.offset}"]
    assert isinstance(held, Reservations)
    assert (held.tenant, held.chain, held.jobs) == (CHILD, (CHILD, ROOT), (uid("a"),))


def test_a_repeat_is_silent_within_the_window_and_a_stolen_id_is_a_dead_letter():
    fold = known((FLAT, {}))
    assert ask(fold, FLAT, "a", source="/one").admitted
    fold.now_ms += SEEN_WINDOW_MS - 1
    before = fold.stored()
    assert ask(fold, FLAT, "a", source="/one") is None
    assert ask(fold, FLAT, "a", source="/two") is None
    assert fold.reasons() == ["id-conflict"]
    assert fold.stored() == before


def test_another_tenants_request_with_the_same_id_is_no_silent_repeat():
    """Both may come through one gateway, that is, from one source."""
    fold = known((FLAT, {}), (ROOT, {}))
    assert ask(fold, FLAT, "a").admitted
    assert ask(fold, ROOT, "a") is None
    assert fold.reasons() == ["id-conflict"]
    fold.now_ms += SEEN_WINDOW_MS
    fold.feed(ClockTick(role="admission"))
    assert ask(fold, ROOT, "a") is None
    assert fold.reasons() == ["id-conflict"] * 2, "the job is still open"


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/a.csv", "a/../../b.csv", ".."])
def test_a_path_out_of_the_tenants_directory_is_a_dead_letter_that_leaves_nothing(path):
    fold = known((FLAT, {}))
    before = fold.stored()
    outside = FileRecords(path=path, format="csv")
    for left, right in ((outside, InlineRecords(rows=())), (InlineRecords(rows=()), outside)):
        assert ask(fold, FLAT, "a", body=JobRequested(left=left, right=right, rules=MatchRules())) is None
    assert fold.reasons() == ["outside-tenant"] * 2
    assert fold.stored() == before
    inside = FileRecords(path="a/..b.csv", format="csv")
    assert ask(fold, FLAT, "a", body=JobRequested(left=inside, right=inside, rules=MatchRules())).admitted


def test_a_refused_request_is_not_decided_twice_either():
    fold = known((FLAT, {"status": TenantStatus.SUSPENDED}))
    assert ask(fold, FLAT, "a").reason is RejectReason.TENANT_SUSPENDED
    fold.feed(change(FLAT, 2), FLAT)
    assert ask(fold, FLAT, "a") is None


def test_a_job_that_is_still_open_is_not_admitted_again_when_its_id_has_been_forgotten():
    """A job may wait longer than ids are remembered; admitted twice, it would hold a slot for ever."""
    fold = known((FLAT, {}))
    assert ask(fold, FLAT, "a", source="/one").admitted
    fold.now_ms += 2 * SEEN_WINDOW_MS
    fold.feed(ClockTick(role="admission"))
    assert list(fold.logic._seen) == []
    assert ask(fold, FLAT, "a", source="/one") is None
    assert ask(fold, FLAT, "a", source="/two") is None
    assert fold.reasons() == ["id-conflict"]
    assert usage_of(fold, FLAT).running == 1
    fold.feed(finish(uid("a")), FLAT)
    assert usage_of(fold, FLAT).running == 0
    assert ask(fold, FLAT, "a", source="/one").admitted, "a finished job's forgotten id is a new job"


@pytest.mark.parametrize("tenant", [FLAT, CHILD])
def test_a_foreign_key_is_a_dead_letter_for_known_and_unknown_tenants(tenant):
    for fold in (new_fold(), known((ROOT, {}), (CHILD, {}), (FLAT, {}))):
        before = fold.stored()
        assert ask(fold, tenant, "a", key=BIG) is None
        assert fold.reasons() == ["foreign-tenant"]
        assert fold.stored() == before


def test_a_tenant_does_not_move_under_another_root():
    fold = known((ROOT, {}), (CHILD, {}))
    before = fold.stored()
    moved = TenantChanged(version=2, slug="s", tier=TenantTier.SCALE, status=TenantStatus.ACTIVE, root_id=CHILD)
    fold.feed(moved, CHILD, key=CHILD)
    assert fold.reasons() == ["root-moved"]
    assert fold.stored() == before


@pytest.mark.parametrize(
    ("suspended", "status"),
    [(CHILD, TenantStatus.SUSPENDED), (ROOT, TenantStatus.SUSPENDED), (ROOT, TenantStatus.DELETED)],
)
def test_a_suspended_level_suspends_everything_below_it(suspended, status):
    fold = known((ROOT, {}), (CHILD, {}), (GRANDCHILD, {}))
    assert ask(fold, GRANDCHILD, "a").admitted
    fold.feed(change(suspended, 2, status=status), suspended, key=ROOT)
    assert ask(fold, GRANDCHILD, "b").reason is RejectReason.TENANT_SUSPENDED
    fold.feed(change(suspended, 3), suspended, key=ROOT)
    assert ask(fold, GRANDCHILD, "c").admitted


def test_unknown_tenants_unknown_parents_and_unknown_kinds():
    fold = known((ROOT, {}), (ORPHAN, {}))
    assert ask(fold, FLAT, "a").reason is RejectReason.UNKNOWN_TENANT
    assert ask(fold, ORPHAN, "b").reason is RejectReason.TENANT_SUSPENDED
    assert ask(fold, ROOT, "c", body=request("mystery")).reason is RejectReason.UNSUPPORTED_KIND


def test_a_killed_kind_is_refused_and_only_that_kind():
    fold = known((FLAT, {}))
    fold.feed(flag(1, killed=True))
    assert ask(fold, FLAT, "a").reason is RejectReason.FLAG_DISABLED
    assert ask(fold, FLAT, "b", body=request("reconciliation-preview")).admitted
    fold.feed(flag(2))
    assert ask(fold, FLAT, "c").admitted
    fold.feed(flag(1, killed=True))
    fold.restart()
    assert ask(fold, FLAT, "d").admitted, "an older flag state must not come back with a restart"


@pytest.mark.parametrize(("name", "kept"), [("jobs.reconciliation", 1), ("jobs.of-a-later-release", 1), ("beta", 0)])
def test_only_flags_that_gate_jobs_are_kept(name, kept):
    fold = known((FLAT, {}))
    fold.feed(FlagState(flag=name, scope=FlagScope.TENANT, version=1, changed_at_ms=0), FLAT)
    assert sum(key.startswith("flag/") for key in fold.stored()) == kept


def test_the_partitions_bound_holds_for_every_tier_and_a_root_has_half_of_it():
    fold = known(
        (BIG, {"tier": TenantTier.ENTERPRISE}), (ROOT, {"tier": TenantTier.ENTERPRISE}), (CHILD, {}), (FLAT, {})
    )
    for number in range(OPEN_JOBS_MAX // 2):
        assert ask(fold, BIG, f"j{number}").admitted
    assert ask(fold, BIG, "x").reason is RejectReason.POOL_FULL
    assert ask(fold, ROOT, "r").admitted
    for number in range(OPEN_JOBS_MAX // 2 - 1):
        assert ask(fold, CHILD, f"c{number}").admitted
    for tenant in (CHILD, ROOT, FLAT):
        assert ask(fold, tenant, f"{tenant} more").reason is RejectReason.POOL_FULL
    assert ask(fold, FLAT, "z").reason is RejectReason.POOL_FULL
    fold.feed(finish(uid("j0")), BIG)
    assert ask(fold, FLAT, "again").admitted


def test_a_result_releases_once_at_every_level():
    fold = known((ROOT, {}), (CHILD, {"quotas": {QuotaType.CONCURRENT_JOBS: 2}}))
    assert ask(fold, CHILD, "a").admitted
    assert ask(fold, CHILD, "b").admitted
    refused = ask(fold, CHILD, "c")
    assert (refused.reason, refused.current, refused.limit) == (RejectReason.CONCURRENT_JOBS, 2, 2)
    for _ in range(3):
        fold.feed(finish(uid("a")), CHILD, key=ROOT)
    assert [usage_of(fold, tenant).running for tenant in (ROOT, CHILD)] == [1, 1]
    assert ask(fold, CHILD, "d").admitted
    assert not ask(fold, CHILD, "e").admitted


def test_children_share_their_parents_pool():
    fold = known((ROOT, {"quotas": {QuotaType.CONCURRENT_JOBS: 1}}), (CHILD, {}), (GRANDCHILD, {}))
    assert ask(fold, GRANDCHILD, "a").admitted
    for tenant in (ROOT, CHILD, GRANDCHILD):
        assert ask(fold, tenant, f"b{tenant}").reason is RejectReason.CONCURRENT_JOBS


def test_the_month_ends_at_midnight_utc():
    end_ms = int(dt.datetime(2025, 12, 1, tzinfo=dt.UTC).timestamp()) * 1000
    fold = known((FLAT, {"quotas": {QuotaType.MONTHLY_RECONCILIATIONS: 1}}))
    assert ask(fold, FLAT, "a").admitted
    refused = ask(fold, FLAT, "b")
    assert (refused.reason, refused.retry_after_ms) == (RejectReason.MONTHLY_RECONCILIATIONS, end_ms - START_MS)
    fold.now_ms = end_ms - 1
    assert not ask(fold, FLAT, "c").admitted
    fold.now_ms = end_ms
    assert ask(fold, FLAT, "d").admitted
    assert not ask(fold, FLAT, "e").admitted


def test_enterprise_bypasses_its_limits_and_is_metered():
    none = dict.fromkeys(QuotaType, 0)
    fold = known((BIG, {"tier": TenantTier.ENTERPRISE, "quotas": none}))
    for number in range(3):
        assert ask(fold, BIG, f"j{number}").admitted
    usage = usage_of(fold, BIG)
    assert (usage.running, usage.requests, usage.month_jobs) == (3, 3, 3)
    (report,) = fold.feed(ClockTick(role="admission"))
    assert (report.data.running, report.data.used[Resource.REQUESTS]) == (3, 3)


def test_a_change_of_tier_is_announced_acknowledged_and_holds_at_once():
    fold = known((FLAT, {"tier": TenantTier.FREE, "quotas": {QuotaType.CONCURRENT_JOBS: 1}}))
    assert ask(fold, FLAT, "a").admitted
    assert not ask(fold, FLAT, "b").admitted
    emits = fold.feed(change(FLAT, 2, TenantTier.SCALE), FLAT)
    weighted = [emit for emit in emits if isinstance(emit.data, TenantWeighted)]
    assert [emit.partition for emit in weighted] == list(range(POOLS))
    assert {emit.data for emit in weighted} == {TenantWeighted(weight=10, enterprise=False, max_running=32, version=2)}
    assert [emit.data for emit in emits if isinstance(emit.data, TenantAcknowledged)] == [TenantAcknowledged(version=2)]
    assert ask(fold, FLAT, "c").admitted
    before = fold.stored()
    again = fold.feed(change(FLAT, 2, TenantTier.FREE), FLAT)
    assert [emit.data for emit in again] == [TenantAcknowledged(version=2)], "who repeats a change waits for that"
    assert again[0].suffix not in {emit.suffix for emit in emits}, "the relay may publish one event twice"
    assert fold.feed(change(FLAT, 1, TenantTier.FREE), FLAT) == ()
    assert fold.stored() == before


def test_a_new_rate_pays_for_no_past_time():
    fold = known((FLAT, {"quotas": {QuotaType.RATE_LIMIT: 0}, "burst": 5}), open_jobs_max=100)
    for number in range(5):
        assert ask(fold, FLAT, f"j{number}").admitted
    fold.now_ms += 3_600_000
    fold.feed(change(FLAT, 2, quotas={QuotaType.RATE_LIMIT: 60}, burst=5), FLAT)
    refused = ask(fold, FLAT, "x")
    assert (refused.reason, refused.retry_after_ms) == (RejectReason.RATE_LIMIT, 1_000)


def test_a_burst_that_no_bucket_can_store_is_a_dead_letter():
    fold = new_fold()
    assert fold.feed(change(FLAT, burst=2**62), FLAT) == ()
    assert fold.reasons() == ["out-of-range"]
    assert fold.stored() == {}


def test_storage_beyond_64_bits_is_a_dead_letter_that_leaves_nothing():
    fold = known((ROOT, {}), (CHILD, {}))
    most = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=2**63 - 1)
    fold.feed(most, ROOT)
    before = fold.stored()
    fold.feed(most, CHILD, key=ROOT)
    assert fold.reasons() == ["out-of-range"]
    assert fold.stored() == before


def test_usage_below_an_unknown_parent_leaves_nothing():
    fold = known((ORPHAN, {}))
    used = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=1)
    lost = fold.record(used, ORPHAN, key=ROOT)
    fold.fold(lost)
    assert fold.reasons() == ["unknown-tenant"]
    fold.now_ms += SEEN_WINDOW_MS - 1
    ask(fold, ORPHAN, "a")
    fold.now_ms += 1
    fold.feed(ClockTick(role="admission"))
    assert list(fold.logic._seen) == [uid("a")], "what was never remembered is not forgotten"


def test_each_threshold_is_signalled_once_until_use_has_fallen():
    fold = known((FLAT, {"quotas": {QuotaType.STORAGE: 100}}))

    def use(quantity):
        emits = fold.feed(UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=quantity), FLAT)
        return [emit.data.percent for emit in emits if isinstance(emit.data, QuotaThreshold)]

    assert [use(q) for q in (79, 1, 5, 5, 1, 9, 1)] == [[], [80], [], [90], [], [100], []]
    assert use(-21) == []
    assert use(1) == [], "80 % again, without having been below it"
    assert use(-2) == []
    assert use(40) == [80, 90, 100]


def test_the_months_thresholds_come_once_a_month_and_at_every_level_that_reaches_them():
    fold = known((ROOT, {"quotas": {QuotaType.MONTHLY_RECONCILIATIONS: 5}}), (CHILD, {}), open_jobs_max=1000)
    for month in range(2):
        for number in range(6):
            ask(fold, CHILD, f"m{month} {number}")
            fold.feed(finish(uid(f"m{month} {number}")), CHILD, key=ROOT)
        fold.now_ms += 15 * DAY_MS
    signals = [e for e in fold.emitted(QuotaThreshold) if e.data.quota is QuotaType.MONTHLY_RECONCILIATIONS]
    assert [(e.tenant, e.data.percent) for e in signals] == [(ROOT, p) for p in (80, 90, 100)] * 2
    assert len({e.data.window_start_ms for e in signals}) == 2


def test_a_tick_reports_each_active_tenant_once_and_a_restart_forgets_and_adds_none():
    fold = known((ROOT, {}), (CHILD, {}), (FLAT, {}))

    def reported():
        return {emit.tenant for emit in fold.feed(ClockTick(role="admission")) if isinstance(emit.data, TenantUsage)}

    assert reported() == {ROOT, CHILD, FLAT}
    fold.restart()
    assert reported() == set()
    ask(fold, CHILD, "a")
    fold.restart()
    assert reported() == {ROOT, CHILD}
    before = fold.stored()
    assert reported() == set()
    assert fold.stored() == before, "an idle tick stores nothing"
    fold.feed(finish(uid("a")), CHILD, key=ROOT)
    assert reported() == {ROOT, CHILD}


def test_a_tick_that_is_in_the_log_twice_reports_under_different_ids():
    """Its producer sends it again when the answer does not come, and meanwhile more has happened."""
    fold, ids = known((ROOT, {}), (CHILD, {})), []
    for name in ("a", "b"):
        ask(fold, CHILD, name)
        tick = fold.record(ClockTick(role="admission"), PLATFORM, event_id=uid("tick"))
        ids += [derived_id(tick.event.id, e.suffix) for e in fold.fold(tick) if isinstance(e.data, TenantUsage)]
    assert len(ids) == len(set(ids)) == 4


def test_a_report_says_what_is_used_and_what_is_allowed():
    fold = known((FLAT, {"tier": TenantTier.FREE}))
    for number in range(3):
        assert ask(fold, FLAT, f"j{number}").admitted
    fold.feed(finish(uid("j0")), FLAT)
    fold.feed(UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=77), FLAT)
    fold.now_ms += 1_000
    (report,) = (emit.data for emit in fold.feed(ClockTick(role="admission")))
    assert report.running == 2
    assert report.used == {
        Resource.REQUESTS: 3, Resource.RECONCILIATIONS: 3, Resource.STORAGE_BYTES: 77, Resource.CUSTOM_DOMAINS: 0
    }  # fmt: skip
    assert (report.rate_burst, report.rate_tokens_used) == (20, 2), "one of three tokens has flowed back"
    assert report.limits == load_tiers()[TenantTier.FREE].limits()


def test_only_the_owner_of_an_open_job_can_cancel_it():
    fold = known((ROOT, {}), (CHILD, {}))
    ask(fold, CHILD, "a")
    assert fold.feed(JobCancelRequested(job_id=uid("a")), ROOT) == ()
    (cancel,) = fold.feed(JobCancelRequested(job_id=uid("a"), reason="r"), CHILD, key=ROOT)
    assert cancel.data == PoolCancelRequested(job_id=uid("a"), reason="r")
    assert (cancel.topic, cancel.partition) == ("pool-inputs", partition_of(ROOT, POOLS))
    fold.feed(finish(uid("a")), CHILD, key=ROOT)
    assert fold.feed(JobCancelRequested(job_id=uid("a")), CHILD, key=ROOT) == ()


def test_a_parent_circle_ends():
    """No tenant service allows one; should one come all the same, a decision still ends and charges each level once."""
    fold = new_fold()
    for tenant, parent in ((ROOT, CHILD), (CHILD, ROOT)):
        body = TenantChanged(
            version=1, slug="s", tier=TenantTier.STARTER, status=TenantStatus.ACTIVE, root_id=ROOT, parent_id=parent
        )
        fold.feed(body, tenant, key=ROOT)
    assert ask(fold, CHILD, "a").admitted
    assert usage_of(fold, ROOT).running == usage_of(fold, CHILD).running == 1
    fold.feed(finish(uid("a")), CHILD, key=ROOT)
    assert usage_of(fold, ROOT).running == usage_of(fold, CHILD).running == 0


def test_the_bound_on_remembered_ids_forgets_the_oldest_first_also_after_a_restart(monkeypatch):
    monkeypatch.setattr(dedup, "SEEN_MAX", 5)
    fold, twin = (known((BIG, {"tier": TenantTier.ENTERPRISE}), open_jobs_max=1000) for _ in range(2))
    for number in range(12):
        twin.restart()
        for one in (fold, twin):
            ask(one, BIG, f"j{number}")
        assert list(fold.logic._seen) == [uid(f"j{n}") for n in range(max(0, number - 4), number + 1)]
        assert twin.stored() == fold.stored()


@pytest.mark.parametrize(("resource", "field"), [("STORAGE_BYTES", "storage_bytes"), ("CUSTOM_DOMAINS", "domains")])
def test_a_tenant_gives_back_what_it_has_and_nothing_of_its_parents(resource, field):
    fold = known((ROOT, {}), (CHILD, {}), (GRANDCHILD, {}))

    def used(tenant, quantity):
        fold.feed(UsageRecorded(resource=Resource[resource], quantity=quantity), tenant, key=ROOT)
        return [getattr(usage_of(fold, each), field) for each in (ROOT, CHILD, GRANDCHILD)]

    for tenant, quantity in ((ROOT, 90), (CHILD, 5), (GRANDCHILD, 3)):
        used(tenant, quantity)
    assert used(GRANDCHILD, -(2**63)) == used(GRANDCHILD, -1) == [95, 5, 0]
    assert used(GRANDCHILD, 3) == [98, 8, 3]
    assert used(CHILD, -9) == [90, 0, 3], "what it holds together with its child"
    assert used(GRANDCHILD, -3) == [90, 0, 0]


@pytest.mark.parametrize("resource", [Resource.STORAGE_BYTES, Resource.CUSTOM_DOMAINS])
def test_an_erasure_gives_back_nothing_of_a_parents(resource):
    fold = known((ROOT, {}), (CHILD, {}), (GRANDCHILD, {}))
    for tenant, quantity in ((ROOT, 90), (GRANDCHILD, 3), (CHILD, -9)):
        fold.feed(UsageRecorded(resource=resource, quantity=quantity), tenant, key=ROOT)
    fold.feed(TenantErased(version=9, root_id=ROOT), GRANDCHILD, key=ROOT)
    assert max(usage_of(fold, ROOT).storage_bytes, usage_of(fold, ROOT).domains) == 90


def test_storage_that_is_given_back_is_reported_also_by_a_new_owner():
    fold = known((ROOT, {}))
    fold.feed(UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=5), ROOT)
    fold.feed(ClockTick(role="admission"))
    fold.feed(UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=-5), ROOT)
    fold.restart()
    (report,) = fold.feed(ClockTick(role="admission"))
    assert (report.tenant, report.data.used[Resource.STORAGE_BYTES]) == (ROOT, 0)
