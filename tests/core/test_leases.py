"""The roster ends each lease once, places each job once, and equals its own restored copy."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.leases import EndedLease, ExecutorLease, Placement, Roster
from settler_streams.errors import ConflictError, InvalidRequestError

LEASE_MS = 100
names = st.sampled_from(["x1", "x2", "x3"])
incarnations = st.sampled_from(["i1", "i2", "i3"])
job_ids = st.sampled_from([f"j{n}" for n in range(12)])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("joined"), names, incarnations, st.integers(0, 4)),
        st.tuples(st.just("heartbeat"), names, incarnations, st.lists(job_ids, max_size=3, unique=True).map(tuple)),
        st.tuples(st.just("draining"), names, incarnations, st.lists(job_ids, max_size=3, unique=True).map(tuple)),
        st.tuples(st.just("left"), names, incarnations),
        st.tuples(st.just("expired")),
        st.tuples(st.just("ticked"), st.booleans()),
        st.tuples(st.just("place"), job_ids),
        st.tuples(st.just("place"), job_ids),
        st.tuples(st.just("released"), job_ids),
    ),
    max_size=80,
)


def apply(roster, operation, now_ms):
    kind, *arguments = operation
    if kind == "joined":
        return roster.joined(*arguments, now_ms)
    if kind == "heartbeat":
        return roster.heartbeat(*arguments, now_ms, LEASE_MS)
    if kind == "draining":
        return roster.draining(*arguments, now_ms)
    if kind == "ticked":
        return roster.ticked(now_ms, follows=arguments[0])
    if kind == "expired":
        return roster.expired(now_ms, LEASE_MS)
    if kind == "place":
        return None if roster.placement(arguments[0]) else roster.place(arguments[0], now_ms)
    return getattr(roster, kind)(*arguments)


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(0, 60))
def test_slots_are_never_overfilled_and_a_restore_changes_nothing(steps, gap_ms):
    roster, stored = Roster(), {}
    for number, operation in enumerate(steps):
        restored = Roster([msgspec.msgpack.decode(raw, type=ExecutorLease) for raw in reversed(list(stored.values()))])
        before = {lease.executor: lease for lease in roster.leases()}
        answer = apply(roster, operation, number * gap_ms)
        assert apply(restored, operation, number * gap_ms) == answer
        for executor, lease in roster.drain_changes().items():
            stored.pop(executor, None)
            if lease is not None:
                stored[executor] = msgspec.msgpack.encode(lease)
        held = [one.job_id for lease in roster.leases() for one in lease.held]
        assert len(held) == len(set(held))
        for lease in roster.leases():
            was = before.get(lease.executor)
            assert len(lease.held) <= lease.slots or (lease.slots == 0 and jobs_of(lease) <= jobs_of(was))
        assert roster.free_slots() == roster.slots() - len(held)
        if isinstance(answer, Placement):
            most = max(lease.free for lease in before.values())
            assert answer.executor == min(name for name, lease in before.items() if lease.free == most)
        elif operation[0] == "place" and not any(operation[1] == one.job_id for one in before_held(before)):
            assert not any(lease.free for lease in before.values())


def jobs_of(lease):
    return {one.job_id for one in lease.held}


def before_held(before):
    return [one for lease in before.values() for one in lease.held]


def test_a_newer_incarnation_ends_the_older_ones_lease_and_fences_it():
    roster = Roster()
    roster.joined("x", "i1", 2, 0)
    roster.place("j1", 0)
    assert roster.joined("x", "i2", 2, 10) == EndedLease("x", "i1", ("j1",))
    assert roster.placement("j1") is None
    assert roster.heartbeat("x", "i1", ("j1",), 20, LEASE_MS) == (False, ("j1",), ())
    assert roster.left("x", "i1") is None
    assert roster.joined("x", "i1", 9, 30) is None
    assert roster.free_slots() == 2


def test_a_lease_ends_when_its_time_is_over_and_not_before():
    roster = Roster()
    roster.joined("x", "i1", 1, 0)
    roster.heartbeat("x", "i1", (), 50, LEASE_MS)
    assert roster.expired(149, LEASE_MS) == ()
    assert roster.expired(150, LEASE_MS) == (EndedLease("x", "i1", ()),)
    assert roster.expired(151, LEASE_MS) == ()


def test_a_heartbeat_reports_foreign_jobs_and_those_that_never_arrived():
    roster = Roster()
    roster.joined("x", "i1", 4, 0)
    roster.place("old", 0)
    roster.ticked(40, follows=True)
    roster.place("new", 45)
    assert roster.heartbeat("x", "i1", ("other",), 500, LEASE_MS) == (True, ("other",), ()), "not read yet, maybe"
    roster.ticked(520, follows=False)
    roster.ticked(540, follows=True)
    assert roster.heartbeat("x", "i1", ("other",), 540 + LEASE_MS - 1, LEASE_MS).missing == ()
    roster.place("newest", 541)
    for now_ms in (550, 590):
        roster.ticked(now_ms, follows=True)
    assert roster.heartbeat("x", "i1", ("other",), 540 + LEASE_MS, LEASE_MS) == (True, ("other",), ("old", "new"))


def test_a_heartbeat_of_the_past_does_not_shorten_a_lease():
    roster = Roster()
    roster.joined("x", "i1", 1, 100)
    roster.heartbeat("x", "i1", (), 10, LEASE_MS)
    assert roster.expired(199, LEASE_MS) == ()


def test_a_job_is_placed_and_released_once():
    roster = Roster()
    roster.joined("x", "i1", 1, 0)
    roster.place("j1", 0)
    with pytest.raises(ConflictError):
        roster.place("j1", 0)
    assert roster.place("j2", 0) is None
    assert roster.released("j1")
    assert not roster.released("j1")
    assert roster.place("j2", 0) == Placement("x", "i1")
    with pytest.raises(InvalidRequestError):
        roster.joined("y", "i1", -1, 0)
