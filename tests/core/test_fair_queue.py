"""The fair queue decides as its rules say, one linear scan at a time, and as its own restored copy does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from settler_streams.core.fair_queue import FairQueue
from settler_streams.core.pool_values import Changes, Contract, PoolClock, QueuedJob, TenantShare
from settler_streams.errors import ConflictError, InvalidRequestError

_spec = importlib.util.spec_from_file_location("fair_queue_oracle", Path(__file__).with_name("fair_queue_oracle.py"))
assert _spec is not None
assert _spec.loader is not None
oracle_module = importlib.util.module_from_spec(_spec)
sys.modules["fair_queue_oracle"] = oracle_module
_spec.loader.exec_module(oracle_module)

TENANTS = [f"t{n}" for n in range(5)]
contracts = st.builds(
    Contract, st.sampled_from([1, 2, 5, 10, 3]), st.booleans(), st.sampled_from([None, None, None, 0, 1, 2])
)
costs = st.one_of(st.integers(0, 100), st.sampled_from([1_000_000, 10_000_000, 10**9]))
operations = st.lists(
    st.one_of(
        st.tuples(st.just("enqueue"), st.sampled_from(TENANTS), st.integers(0, 3), costs),
        st.tuples(st.just("enqueue"), st.sampled_from(TENANTS), st.integers(0, 3), costs),
        st.tuples(st.just("enqueue as"), st.sampled_from(TENANTS), contracts, costs),
        st.tuples(st.just("dispatch")),
        st.tuples(st.just("dispatch")),
        st.tuples(st.just("finished"), st.integers(0, 99), costs),
        st.tuples(st.just("requeue"), st.integers(0, 99), costs),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
        st.tuples(st.just("contract"), st.sampled_from(TENANTS), contracts),
        st.tuples(st.just("slots"), st.integers(0, 5)),
        st.tuples(st.just("restore"), st.booleans()),
    ),
    max_size=120,
)


class Store:
    """What a changelog keeps: encoded values by key, as the fold would write them."""

    def __init__(self):
        self.tenants: dict[str, bytes] = {}
        self.jobs: dict[str, bytes] = {}
        self.clock = b""

    def apply(self, changes: Changes):
        for kept, changed in ((self.tenants, changes.tenants), (self.jobs, changes.jobs)):
            for key, value in changed.items():
                if value is None:
                    kept.pop(key, None)
                else:
                    kept[key] = msgspec.msgpack.encode(value)
        if changes.clock is not None:
            self.clock = msgspec.msgpack.encode(changes.clock)

    def restore(self, reserved: int, *, backwards: bool) -> FairQueue:
        step = -1 if backwards else 1
        tenants = [msgspec.msgpack.decode(raw, type=TenantShare) for raw in self.tenants.values()][::step]
        jobs = [msgspec.msgpack.decode(raw, type=QueuedJob) for raw in self.jobs.values()][::step]
        return FairQueue.restore(msgspec.msgpack.decode(self.clock, type=PoolClock), tenants, jobs, reserved)


def apply_both(queue, oracle, operation, seq, known):
    """Apply one operation to both, and demand the same answer."""
    kind, *arguments = operation
    if kind == "enqueue":
        tenant, priority, cost = arguments
        contract = known.setdefault(tenant, Contract(1 + len(known), tenant == "t4"))
        queue.enqueue(QueuedJob(tenant, f"j{seq}", priority, seq, cost), contract)
        oracle.enqueue(tenant, f"j{seq}", priority, seq, cost, contract)
    elif kind == "enqueue as":
        tenant, contract, cost = arguments
        known[tenant] = contract
        queue.enqueue(QueuedJob(tenant, f"j{seq}", 0, seq, cost), known[tenant])
        oracle.enqueue(tenant, f"j{seq}", 0, seq, cost, known[tenant])
    elif kind == "dispatch":
        dispatched = queue.dispatch(seq)
        assert (None if dispatched is None else tuple(dispatched)) == oracle.dispatch()
    elif kind == "finished":
        job_id = pick(oracle, arguments[0], running=None)
        assert queue.finished(job_id, arguments[1]) == oracle.finished(job_id, arguments[1])
    elif kind == "requeue":
        job_id = pick(oracle, arguments[0], running=True)
        attempt = queue.job(job_id).attempt if queue.job(job_id) else 1
        assert queue.requeue(job_id, attempt, arguments[1]) == oracle.requeue(job_id, attempt, arguments[1])
    elif kind == "cancel":
        job_id = pick(oracle, arguments[0], running=False)
        tenant = queue.job(job_id).tenant if queue.job(job_id) else "t0"
        assert queue.cancel(tenant, job_id) == oracle.cancel(tenant, job_id)
    elif kind == "contract":
        known[arguments[0]] = arguments[1]
        queue.set_contract(*arguments)
        oracle.set_contract(*arguments)
    elif kind == "slots":
        queue.set_slots(arguments[0])
        oracle.slots = arguments[0]


def pick(oracle, index, *, running):
    jobs = sorted(job.job_id for job in oracle.jobs if running is None or job.running == running)
    return jobs[index % len(jobs)] if jobs else "nobody"


@settings(max_examples=400, deadline=None)
@given(operations, st.integers(0, 4), st.sampled_from([0, 250, 333, 1000]))
@example(  # a tenant without jobs, still ahead of its lane, comes back in another lane
    [
        ("enqueue", "t1", 0, 0),
        ("enqueue", "t0", 0, 0),
        ("finished", 0, 1),
        ("enqueue as", "t1", Contract(1, True, None), 0),
    ],
    0,
    0,
)
def test_each_decision_equals_the_linear_scan_and_survives_a_restore(steps, slots, reserved):
    queue, oracle, store, known = FairQueue(slots, reserved), oracle_module.Oracle(slots, reserved), Store(), {}
    store.clock = msgspec.msgpack.encode(queue.clock)
    store.apply(queue.drain_changes())
    for seq, operation in enumerate([*steps, *[("restore", False)], *[("dispatch",)] * 10]):
        if operation[0] == "restore":
            queue = store.restore(reserved, backwards=operation[1])
        else:
            apply_both(queue, oracle, operation, seq, known)
            store.apply(queue.drain_changes())
        assert {s.tenant: (s.finish_tag, s.floor_tag, s.epoch) for s in queue.shares()} == {
            name: (t.tag, t.floor, t.epoch) for name, t in oracle.tenants.items()
        }
        assert queue.running == sum(job.running for job in oracle.jobs)
        assert queue.queued == sum(not job.running for job in oracle.jobs)


@settings(max_examples=100, deadline=None)
@given(operations, st.integers(1, 4))
def test_it_is_work_conserving(steps, slots):
    """S3: after a round of dispatching, no slot is free while a tenant below its cap has a queued job."""
    queue, oracle, known = FairQueue(slots), oracle_module.Oracle(slots, 250), {}
    for seq, operation in enumerate(steps):
        apply_both(queue, oracle, operation, seq, known)
    while queue.dispatch(0):
        pass
    able = [share for share in queue.shares() if queue.is_eligible(share.tenant)]
    assert queue.running >= queue.slots or not able


def job(tenant, seq, cost=1_000_000, priority=0):
    return QueuedJob(tenant, f"{tenant}-{seq}", priority, seq, cost)


def test_priority_reorders_only_the_tenants_own_queue():
    queue = FairQueue(1)
    for seq, (tenant, priority) in enumerate([("a", 0), ("a", 3), ("a", 0), ("b", 0), ("b", 0)]):
        queue.enqueue(job(tenant, seq, priority=priority), Contract(1))
    order = []
    while (dispatched := queue.dispatch(0)) is not None:
        order.append(dispatched.job_id)
        queue.finished(dispatched.job_id, 1_000_000)
    assert order == ["a-1", "b-3", "a-0", "b-4", "a-2"]


def test_a_dead_executors_job_goes_first_and_its_attempt_counts():
    queue = FairQueue(1)
    queue.enqueue(job("a", 0), Contract(1))
    queue.enqueue(job("a", 1, priority=3), Contract(1))
    queue.dispatch(0)
    queue.finished("a-1", 1)
    first = queue.dispatch(0)
    queue.enqueue(job("a", 2, priority=3), Contract(1))
    assert not queue.requeue("a-0", 2)
    assert queue.requeue("a-0", 1)
    assert not queue.requeue("a-0", 1)
    again = queue.dispatch(0)
    assert (first.job_id, first.attempt, again.job_id, again.attempt) == ("a-0", 1, "a-0", 2)


def test_a_late_report_of_a_requeued_job_ends_it_and_a_second_report_is_refused():
    queue = FairQueue(1)
    queue.enqueue(job("a", 0), Contract(1))
    queue.dispatch(0)
    queue.requeue("a-0", 1)
    assert queue.finished("a-0", 5)
    assert not queue.finished("a-0", 5)
    assert queue.dispatch(0) is None


def test_a_cancel_takes_only_the_tenants_own_queued_job():
    queue = FairQueue(1)
    queue.enqueue(job("a", 0), Contract(1))
    queue.enqueue(job("a", 1), Contract(1))
    queue.dispatch(0)
    assert not queue.cancel("a", "a-0")
    assert not queue.cancel("b", "a-1")
    assert queue.cancel("a", "a-1")
    assert queue.queued == 0


def test_an_idle_pool_remembers_nobody():
    queue = FairQueue(4)
    for seq in range(200):
        queue.enqueue(job(f"t{seq}", seq), Contract(1, enterprise=seq % 2 == 0))
    while (dispatched := queue.dispatch(0)) is not None:
        queue.finished(dispatched.job_id, 2_000_000)
    assert list(queue.shares()) == []
    assert list(queue.jobs()) == []
    assert queue.clock == PoolClock(4)


def test_a_cancel_storm_leaves_no_heap_behind():
    queue = FairQueue(1)
    queue.enqueue(job("busy", 0), Contract(1))
    queue.enqueue(job("busy", 1), Contract(1))
    queue.dispatch(0)
    for seq in range(2, 5_000):
        queue.enqueue(job("storm", seq), Contract(1))
        queue.cancel("storm", f"storm-{seq}")
    sizes = [len(heap) for lane in queue._lanes for heap in (lane._heap, lane._idle)]
    assert max(sizes) <= 200
    for seq in range(5_000, 9_000):
        queue.enqueue(job("storm", seq), Contract(1))
    for seq in range(5_000, 8_999):
        queue.cancel("storm", f"storm-{seq}")
    assert len(queue._tenants["storm"].heap) <= 66


def test_the_same_job_twice_and_impossible_pools_are_refused():
    queue = FairQueue(1)
    queue.enqueue(job("a", 0), Contract(1))
    with pytest.raises(ConflictError):
        queue.enqueue(job("a", 0), Contract(1))
    for refused in (lambda: FairQueue(-1), lambda: FairQueue(1, 1001), lambda: queue.set_slots(-1)):
        with pytest.raises(InvalidRequestError):
            refused()
    for weight, cap in ((0, None), (1, -1)):
        with pytest.raises(InvalidRequestError):
            Contract(weight, False, cap)
