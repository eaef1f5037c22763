"""The fair queue keeps its claims S1 to S4 in simulated pools, whatever a tenant does to the others."""

from __future__ import annotations

import itertools
import random
from heapq import heappop, heappush

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.fair_queue import FairQueue
from settler_streams.core.pool_values import CHARGED_US_MAX, Contract, QueuedJob
from settler_streams.core.waiting import explain, lag_against_bound

SECOND_US = 1_000_000


class Pool:
    """A pool of slots in simulated microseconds: what is dispatched runs for its true cost."""

    def __init__(self, slots, reserved=250):
        self.queue = FairQueue(slots, reserved)
        self.now_us = 0
        self.seq = itertools.count()
        self.true_us, self.arrived_us, self.waits_us = {}, {}, {}
        self.ends, self.work_us, self.lane_running = [], {}, []
        self.watch = []

    def submit(self, tenant, cost_us, contract=None, *, estimate_us=None, count=1):
        for _ in range(count):
            seq = next(self.seq)
            job_id = f"{tenant}/{seq}"
            self.true_us[job_id], self.arrived_us[job_id] = cost_us, self.now_us
            estimated_us = cost_us if estimate_us is None else estimate_us
            self.queue.enqueue(QueuedJob(tenant, job_id, 0, seq, estimated_us), contract or Contract(1))

    def fill(self):
        while (dispatched := self.queue.dispatch(self.now_us // 1000)) is not None:
            tenant, job_id = dispatched.tenant, dispatched.job_id
            self.waits_us.setdefault(tenant, []).append(self.now_us - self.arrived_us[job_id])
            self.work_us[tenant] = self.work_us.get(tenant, 0) + self.true_us[job_id]
            heappush(self.ends, (self.now_us + self.true_us[job_id], job_id, dispatched.attempt))
            for watcher in self.watch:
                watcher(dispatched)

    def step(self):
        self.fill()
        if not self.ends:
            return False
        self.now_us, job_id, attempt = heappop(self.ends)
        held = self.queue.job(job_id)
        if held is not None and held.attempt == attempt:
            self.queue.finished(job_id, self.true_us[job_id])
        self.fill()
        return True

    def run(self, until_us):
        while (self.ends or self.queue.queued) and (not self.ends or self.ends[0][0] <= until_us):
            if not self.step():
                break
        self.now_us = max(self.now_us, until_us)


def worst_lag(pool, tenants, steps):
    """The worst |W_i/w_i - W_j/w_j| in any interval, over its bound, for tenants that stay backlogged."""
    history = [dict.fromkeys(tenants, 0)]
    for _ in range(steps):
        pool.step()
        history.append({tenant: pool.work_us.get(tenant, 0) for tenant in tenants})
    worst = 0.0
    for i, j in itertools.combinations(tenants, 2):
        (weight_i, cost_i), (weight_j, cost_j) = tenants[i], tenants[j]
        lags = [point[i] / weight_i - point[j] / weight_j for point in history]
        bound = (pool.queue.slots + 1) * (cost_i / weight_i + cost_j / weight_j)
        worst = max(worst, (max(lags) - min(lags)) / bound)
    return worst


mixes = st.lists(
    st.tuples(st.sampled_from([1, 2, 5, 10]), st.integers(1, 20), st.sampled_from([1, 3, 10])), min_size=2, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(mixes, st.integers(1, 6), st.integers(0, 2**32))
def test_s1_backlogged_tenants_stay_within_the_bound(mix, slots, seed):
    dice, pool, tenants = random.Random(seed), Pool(slots), {}  # noqa: S311 - a seeded simulation
    for number, (weight, cost, spread) in enumerate(mix):
        for _ in range(200):
            pool.submit(f"t{number}", dice.randint(cost, cost * spread) * 1000, Contract(weight))
        tenants[f"t{number}"] = (weight, cost * spread * 1000)
    backlogged = 150
    assert worst_lag(pool, tenants, backlogged) <= 1.0
    assert lag_against_bound(pool.queue).per_mille <= 1000


@settings(max_examples=60, deadline=None)
@given(mixes, st.integers(1, 6), st.sampled_from([0.0, 0.01, 100.0]))
def test_s1_holds_with_twice_the_bound_for_lying_estimates(mix, slots, lie):
    """c_max is then the greater of estimate and cost: at most D jobs run on a wrong charge at any moment."""
    pool, tenants = Pool(slots), {}
    for number, (weight, cost, _) in enumerate(mix):
        estimate_us = int(cost * 1000 * lie) if number == 0 else cost * 1000
        pool.submit(f"t{number}", cost * 1000, Contract(weight), estimate_us=estimate_us, count=200)
        tenants[f"t{number}"] = (weight, max(cost * 1000, estimate_us))
    assert worst_lag(pool, tenants, 150) <= 2.0


@pytest.mark.parametrize("estimate_us", [1, SECOND_US, 100 * SECOND_US])
def test_a_lie_about_costs_gains_nothing_in_the_long_run(estimate_us):
    pool = Pool(4)
    pool.submit("liar", SECOND_US, estimate_us=estimate_us, count=2_000)
    pool.submit("honest", SECOND_US, count=2_000)
    pool.run(400 * SECOND_US)
    assert pool.work_us["liar"] <= pool.work_us["honest"] + 8 * SECOND_US
    if estimate_us <= SECOND_US:
        assert pool.work_us["liar"] >= pool.work_us["honest"] - 8 * SECOND_US


def test_estimates_far_too_high_that_are_refunded_keep_nobody_waiting_for_long():
    """Alone in its lane, a tenant raises the virtual time by them, at which every newcomer begins."""
    pool = Pool(8)
    pool.submit("liar", 2 * SECOND_US, estimate_us=86_400 * SECOND_US, count=8)
    pool.submit("liar", SECOND_US, count=4_000)
    pool.run(10 * SECOND_US)
    pool.submit("quiet", SECOND_US)
    pool.run(400 * SECOND_US)
    (wait_us,) = pool.waits_us["quiet"]
    assert wait_us <= CHARGED_US_MAX


def quiet_waits(flood, *, slots=4, enterprise=False):
    """The waits of a tenant that sends a job a second beside one that has dumped ``flood`` jobs of its own tier."""
    pool = Pool(slots)
    contract = Contract(1, enterprise)
    pool.submit("flood", SECOND_US, contract, count=flood)
    pool.fill()
    for second in range(1, 60):
        pool.run(second * SECOND_US - 500_000)
        pool.submit("quiet", SECOND_US, contract)
    pool.run(120 * SECOND_US)
    return pool.waits_us["quiet"]


@pytest.mark.parametrize("enterprise", [False, True])
def test_s2_the_wait_does_not_depend_on_anothers_backlog(enterprise):
    """Backlog dump, same-tier flood and Enterprise flood in one: ten times the backlog, the same waits."""
    short, long = quiet_waits(400, enterprise=enterprise), quiet_waits(4_000, enterprise=enterprise)
    assert len(short) == len(long) == 59
    assert short == long
    assert max(long) <= SECOND_US


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from([100, 250, 333, 500]))
def test_s4_neither_lane_exceeds_its_share_while_both_are_backlogged(slots, reserved):
    pool, work = Pool(slots, reserved), {True: 0, False: 0}

    def shares_hold(dispatched):
        running = dict.fromkeys((True, False), 0)
        for job in pool.queue.running_jobs():
            running[job.tenant.startswith("e")] += 1
        assert running[True] <= -(-slots * reserved // 1000)
        assert running[False] <= -(-slots * (1000 - reserved) // 1000)
        work[dispatched.enterprise] += 1

    for tenant in ("e1", "e2", "s1", "s2"):
        pool.submit(tenant, SECOND_US, Contract(1, tenant[0] == "e"), count=400)
    pool.watch.append(shares_hold)
    for _ in range(600):
        pool.step()
    share = work[True] / (work[True] + work[False])
    assert abs(share - reserved / 1000) < 0.03


def test_s4_lent_slots_return_as_jobs_end():
    pool = Pool(8)
    pool.submit("enterprise", SECOND_US, Contract(1, True), count=100)
    pool.fill()
    pool.submit("standard", SECOND_US, count=100)
    pool.fill()
    assert pool.queue.running == 8
    assert "standard" not in pool.work_us
    pool.run(SECOND_US)
    running = [job.tenant for job in pool.queue.running_jobs()]
    assert running.count("enterprise") == 2
    assert running.count("standard") == 6


def test_enterprise_does_not_queue_below_its_reserved_share():
    pool = Pool(8)
    pool.submit("standard", 10 * SECOND_US, count=1_000)
    pool.submit("enterprise", SECOND_US, Contract(1, True), count=2)
    pool.fill()
    assert pool.waits_us["enterprise"] == [0, 0]


@pytest.mark.parametrize("estimate_us", [1, 90 * SECOND_US, 500 * SECOND_US])
def test_idle_time_and_refunds_of_idle_time_earn_no_credit(estimate_us):
    """A tenant that ran one job, whatever it said of it, and queued nothing gets no more than its half afterwards."""
    pool = Pool(4)
    pool.submit("steady", SECOND_US, count=5_000)
    pool.submit("hoarder", 90 * SECOND_US, estimate_us=estimate_us)
    pool.run(89 * SECOND_US)
    pool.submit("hoarder", SECOND_US, count=1_000)
    pool.run(91 * SECOND_US)
    before = dict(pool.work_us)
    pool.run(141 * SECOND_US)
    gained = {tenant: pool.work_us[tenant] - before[tenant] for tenant in before}
    assert gained["hoarder"] <= gained["steady"] + 10 * SECOND_US


def test_a_weight_change_acts_on_the_backlog_at_once():
    pool = Pool(4)
    pool.submit("a", SECOND_US, Contract(1), count=2_000)
    pool.submit("b", SECOND_US, Contract(1), count=2_000)
    pool.run(50 * SECOND_US)
    before = dict(pool.work_us)
    pool.queue.set_contract("a", Contract(10))
    pool.run(105 * SECOND_US)
    ratio = (pool.work_us["a"] - before["a"]) / (pool.work_us["b"] - before["b"])
    assert 9 <= ratio <= 11


def test_changing_the_weight_to_and_fro_gains_nothing():
    pool = Pool(4)
    pool.submit("fickle", SECOND_US, Contract(1), estimate_us=50 * SECOND_US, count=2_000)
    pool.submit("steady", SECOND_US, Contract(1), count=2_000)
    for second in range(1, 200):
        pool.run(second * SECOND_US)
        pool.queue.set_contract("fickle", Contract(1 if second % 2 else 2))
    assert pool.work_us["fickle"] <= 2 * pool.work_us["steady"] + 10 * SECOND_US


def test_a_capped_tenant_holds_nobody_up_and_saves_nothing():
    pool = Pool(4)
    pool.submit("capped", SECOND_US, Contract(1, False, 1), count=500)
    pool.submit("other", SECOND_US, count=2_000)
    pool.run(100 * SECOND_US)
    assert pool.work_us["other"] >= 299 * SECOND_US
    pool.queue.set_contract("capped", Contract(1))
    before = dict(pool.work_us)
    pool.run(150 * SECOND_US)
    assert pool.work_us["capped"] - before["capped"] <= 100 * SECOND_US + 10 * SECOND_US


def test_dead_executors_and_cancel_storms_change_no_ones_share():
    """Tenant a loses every third attempt and cancels half of what it submits; it is charged only for what it used."""
    pool, dice = Pool(4), random.Random(7)  # noqa: S311 - a seeded simulation
    pool.submit("a", SECOND_US, count=1_000)
    pool.submit("b", SECOND_US, count=1_000)
    for second in range(1, 101):
        pool.run(second * SECOND_US)
        running = [job for job in pool.queue.running_jobs() if job.tenant == "a"]
        if running and second % 3 == 0:
            lost = dice.choice(running)
            assert pool.queue.requeue(lost.job_id, lost.attempt, used_us=SECOND_US)
        for job in pool.queue.backlog("a")[-4:]:
            assert pool.queue.cancel("a", job.job_id)
    assert abs(pool.work_us["a"] - pool.work_us["b"]) <= 10 * SECOND_US


def test_explain_names_the_reason_and_predicts_the_start():
    pool = Pool(2)
    pool.submit("a", SECOND_US, count=6)
    pool.submit("b", SECOND_US, count=2)
    pool.submit("c", SECOND_US, Contract(1, False, 0))
    pool.fill()
    last = explain(pool.queue, "a/5", 0)
    assert (last.reason, last.position_in_tenant, last.share_per_mille) == ("behind_own_jobs", 4, 500)
    assert last.jobs_ahead == 5
    assert last.tenant_lag_us == SECOND_US
    assert explain(pool.queue, "a/1", 0).reason == "no_slot"
    assert explain(pool.queue, "b/7", 0).reason == "fair_turn"
    paused = explain(pool.queue, "c/8", 0)
    assert (paused.reason, paused.estimated_start_ms) == ("capped", None)
    assert explain(pool.queue, "a/0", 0) is None
    assert explain(pool.queue, "nobody", 0) is None
    predicted = {job.job_id: explain(pool.queue, job.job_id, 0).estimated_start_ms for job in pool.queue.backlog("a")}
    started = {}
    pool.watch.append(lambda dispatched: started.setdefault(dispatched.job_id, pool.now_us // 1000))
    pool.run(100 * SECOND_US)
    assert all(abs(predicted[job_id] - started[job_id]) <= 1000 for job_id in predicted)
