"""What a step admits enters the pool together: each tenant's jobs in order, before whatever is about them."""

from __future__ import annotations

import msgspec

from settler_streams.core import places
from settler_streams.core.fold import NO_TRACE
from settler_streams.events import JobCancelRequested, JobDecided, JobsEnqueued, PoolCancelRequested, TenantErased
from settler_streams.ids import derived_id
from tests.core.harness import uid
from tests.core.test_admission import CHILD, FLAT, ROOT, known, request


def test_what_a_step_admits_enters_the_pool_together_each_tenants_jobs_in_order():
    fold = known((ROOT, {}), (CHILD, {}))
    asked = [
        fold.record(request(), tenant, topic="job-requests", key=ROOT, event_id=uid(name))
        for name, tenant in [("a", CHILD), ("b", ROOT), ("c", CHILD)]
    ]
    asked[2] = msgspec.structs.replace(asked[2], traceparent=b"00-c-01")
    emits = fold.step(*asked)
    assert [emit.data.job_id for emit in emits[:3]] == [uid("a"), uid("b"), uid("c")]
    assert [(emit.tenant, [job.job_id for job in emit.data.jobs]) for emit in emits[3:]] == [
        (CHILD, [uid("a"), uid("c")]),
        (ROOT, [uid("b")]),
    ]
    assert [emit.event_id for emit in emits[3:]] == [derived_id(uid(name), "enqueued") for name in "ab"]
    jobs = emits[3].data.jobs
    assert [(job.offset, job.traceparent) for job in jobs] == [(asked[0].offset, None), (asked[2].offset, "00-c-01")]
    assert {emit.traceparent for emit in emits[3:]} == {NO_TRACE}, "no trace of one for all"
    assert fold.step() == [], "once"


def test_a_cancellation_comes_behind_the_job_that_its_own_step_has_admitted():
    fold = known((ROOT, {}), (CHILD, {}))
    asked = fold.record(request(), CHILD, key=ROOT, event_id=uid("a"))
    cancelled = fold.record(JobCancelRequested(job_id=uid("a")), CHILD, key=ROOT)
    emits = fold.step(asked, cancelled)
    assert [type(emit.data) for emit in emits] == [JobDecided, JobsEnqueued, PoolCancelRequested]
    assert len({(emit.topic, emit.partition) for emit in emits[1:]}) == 1


def test_a_cancellation_leaves_the_jobs_of_others_together():
    fold = known((FLAT, {}), (ROOT, {}))
    first, second = (fold.record(request(), FLAT, event_id=uid(name)) for name in "ab")
    asked = fold.record(request(), ROOT, event_id=uid("c"))
    cancelled = fold.record(JobCancelRequested(job_id=uid("c")), ROOT)
    emits = fold.step(first, asked, cancelled, second)
    entered = [[job.job_id for job in emit.data.jobs] for emit in emits if isinstance(emit.data, JobsEnqueued)]
    assert entered == [[uid("c")], [uid("a"), uid("b")]]


def test_an_erasure_comes_behind_the_jobs_that_its_own_step_has_admitted():
    fold = known((FLAT, {}))
    asked = fold.record(request(), FLAT, event_id=uid("a"))
    erased = fold.record(TenantErased(version=2, root_id=FLAT), FLAT)
    emits = fold.step(asked, erased)
    assert [type(emit.data) for emit in emits if emit.topic == "pool-inputs"][:2] == [JobsEnqueued, TenantErased]


def test_more_jobs_than_an_event_holds_enter_in_several(monkeypatch):
    monkeypatch.setattr(places, "JOBS_MAX", 2)
    fold = known((FLAT, {}), open_jobs_max=100)
    emits = fold.step(*(fold.record(request(), FLAT, event_id=uid(f"j{number}")) for number in range(5)))
    entered = [[job.job_id for job in emit.data.jobs] for emit in emits if isinstance(emit.data, JobsEnqueued)]
    assert entered == [[uid("j0"), uid("j1")], [uid("j2"), uid("j3")], [uid("j4")]]
