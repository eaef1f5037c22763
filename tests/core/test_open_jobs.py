"""Open jobs are stored a few together: which, when they are written again, and that nothing of them stays."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.dedup import SEEN_WINDOW_MS
from settler_streams.core.open_jobs import TOGETHER_MAX, Reservation, Reservations
from settler_streams.core.standings import CHAIN_DEPTH_MAX
from settler_streams.events import JobCancelRequested, TenantErased, TenantTier
from settler_streams.events.envelope import SOURCE_LENGTH_MAX
from tests.core.harness import uid
from tests.core.test_admission import CHILD, FLAT, ROOT, change, finish, key_of, known, request, usage_of


def asked(fold, name, tenant=FLAT, **where):
    return fold.record(request(), tenant, event_id=uid(f"{name}"), **where)


def ended(fold, name, tenant=FLAT):
    return fold.record(finish(uid(f"{name}")), tenant)


def stored(fold):
    """What is stored of open jobs, by key."""
    return {key: value for key, value in fold.state.items() if isinstance(value, Reservations | Reservation)}


def names(*of):
    return tuple(uid(name) for name in of)


def test_jobs_of_one_tenant_that_a_step_admits_are_stored_together():
    fold = known((FLAT, {}), (ROOT, {}), (CHILD, {}))
    first = asked(fold, "a")
    other = asked(fold, "b", CHILD, key=ROOT)
    fold.step(first, other, asked(fold, "c"))
    assert stored(fold) == {
        f"jobs/{first.offset}": Reservations(FLAT, (FLAT,), "/test", names("a", "c")),
        f"jobs/{other.offset}": Reservations(CHILD, (CHILD, ROOT), "/test", names("b")),
    }
    fold.step(later := asked(fold, "d"))
    assert stored(fold)[f"jobs/{later.offset}"].jobs == names("d"), "a later step's are not added to what is stored"


def test_a_job_that_ends_leaves_the_others_and_the_last_one_leaves_nothing():
    fold = known((FLAT, {}))
    first = asked(fold, "a")
    fold.step(first, asked(fold, "b"), asked(fold, "c"))
    fold.restart()
    fold.step(ended(fold, "a"))
    assert stored(fold)[f"jobs/{first.offset}"].jobs == names("b", "c")
    fold.restart()
    fold.step(ended(fold, "c"), ended(fold, "b"), ended(fold, "a"))
    assert stored(fold) == {}
    assert usage_of(fold, FLAT).running == 0


def test_a_job_that_ends_in_the_step_that_admits_it_is_stored_with_no_other():
    fold = known((FLAT, {}))
    first = asked(fold, "a")
    fold.step(first, ended(fold, "a"), asked(fold, "b"))
    assert [value.jobs for value in stored(fold).values()] == [names("b")]
    assert usage_of(fold, FLAT).running == 1


def test_an_id_that_comes_again_while_its_former_neighbours_are_open_is_a_job_of_its_own():
    fold = known((FLAT, {}))
    fold.step(asked(fold, "a"), asked(fold, "b"))
    fold.step(ended(fold, "a"))
    fold.now_ms += 60 * 60_000
    again = asked(fold, "a", source="/another")
    fold.step(again)
    assert sorted(value.jobs for value in stored(fold).values()) == sorted([names("a"), names("b")])
    assert stored(fold)[f"jobs/{again.offset}"].source == "/another"


def test_only_a_few_are_stored_together():
    fold = known((FLAT, {}), open_jobs_max=1_000)
    fold.step(*(asked(fold, f"j{number}") for number in range(2 * TOGETHER_MAX + 1)))
    assert [len(value.jobs) for value in stored(fold).values()] == [TOGETHER_MAX, TOGETHER_MAX, 1]


def test_a_source_and_a_chain_are_those_of_all_that_are_stored_together():
    fold = known((ROOT, {}), (CHILD, {}), open_jobs_max=100)
    moved = msgspec.structs.replace(change(CHILD, version=9), parent_id=None)
    fold.step(
        *(asked(fold, name, CHILD, key=ROOT, source=f"/{source}") for name, source in ("a1", "b2", "c1", "d2")),
        fold.record(moved, CHILD, key=ROOT),
        asked(fold, "e", CHILD, key=ROOT, source="/2"),
    )
    assert [(value.source, value.chain, value.jobs) for value in stored(fold).values()] == [
        ("/1", (CHILD, ROOT), names("a", "c")),
        ("/2", (CHILD, ROOT), names("b", "d")),
        ("/2", (CHILD,), names("e")),
    ]
    fold.step(*(ended(fold, name, CHILD) for name in "abcde"))
    assert (usage_of(fold, CHILD).running, usage_of(fold, ROOT).running) == (0, 0)


def test_an_erased_tenants_jobs_are_gone_and_its_neighbours_untouched():
    fold = known((FLAT, {}), (ROOT, {}), (CHILD, {}))
    fold.step(asked(fold, "a", CHILD, key=ROOT), asked(fold, "b", ROOT), asked(fold, "c", CHILD, key=ROOT))
    fold.step(fold.record(TenantErased(version=9, root_id=ROOT), CHILD, key=ROOT))
    assert [value.jobs for value in stored(fold).values()] == [names("b")]
    assert usage_of(fold, ROOT).running == 1


def test_jobs_that_earlier_versions_have_stored_end_as_others_do():
    fold = known((FLAT, {}))
    fold.step(asked(fold, "a"))
    (key,) = stored(fold)
    fold.state.apply({key: None, f"job/{uid('a')}": Reservation(FLAT, (FLAT,), fold.now_ms, "/test")})
    fold.state.merge()
    fold.restart()
    assert fold.step(asked(fold, "a")) == [], "a repeat"
    assert list(stored(fold)) == [f"job/{uid('a')}"]
    fold.step(ended(fold, "a"))
    assert stored(fold) == {}
    assert usage_of(fold, FLAT).running == 0


def test_a_job_that_is_stored_twice_is_a_state_that_contradicts_itself():
    fold = known((FLAT, {}))
    fold.step(asked(fold, "a"))
    (held,) = stored(fold).values()
    fold.state.apply({"jobs/999": held})
    fold.state.merge()
    with pytest.raises(ValueError, match=r"stored under jobs/\d+ and jobs/\d+"):
        fold.restart()


def test_a_stored_value_is_small_whoever_it_belongs_to():
    """What a lone job's end may write again, at most: the deepest chain, the longest source in the widest letters."""
    chain = tuple(uid(f"level {number}") for number in range(CHAIN_DEPTH_MAX))
    jobs = tuple(uid(f"j{number}") for number in range(TOGETHER_MAX))
    value = Reservations(chain[0], chain, "\N{GRINNING FACE}" * SOURCE_LENGTH_MAX, jobs)
    assert len(msgspec.msgpack.encode(value)) < 1_800


tenants = st.sampled_from([FLAT, FLAT, CHILD, CHILD, ROOT])
numbers = st.integers(0, 40)
operation = st.one_of(
    *[st.tuples(st.just("request"), tenants, numbers, st.sampled_from(["/a", "/a", "/b"]))] * 6,
    *[st.tuples(st.just("finish"), numbers)] * 3,
    st.tuples(st.just("move"), st.sampled_from([ROOT, None])),
    st.tuples(st.just("cancel"), tenants, numbers),
    st.tuples(st.just("later"), st.sampled_from([1, 60_000, SEEN_WINDOW_MS])),
)
steps = st.lists(st.lists(operation, max_size=60), max_size=12)


def record_of(fold, operation, version):
    match operation:
        case ("request", tenant, number, source):
            return asked(fold, number, tenant, key=key_of(tenant), source=source)
        case ("finish", number):
            return ended(fold, number)
        case ("cancel", tenant, number):
            return fold.record(JobCancelRequested(job_id=uid(f"{number}")), tenant, key=key_of(tenant))
        case ("move", parent):
            moved = msgspec.structs.replace(change(CHILD, version, TenantTier.SCALE), parent_id=parent)
            return fold.record(moved, CHILD, key=ROOT)
    raise AssertionError(operation)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_steps_of_any_size_decide_the_same_and_a_rebuilt_fold_stores_the_same(steps):
    """One fold takes a record a step. Of two that take several together, one is built anew before each step."""
    scale = {"tier": TenantTier.SCALE}
    folds = [known((FLAT, scale), (ROOT, scale), (CHILD, scale), open_jobs_max=1_000) for _ in range(3)]
    single, running, rebuilt = folds
    for version, operations in enumerate(steps, 2):
        later_ms = sum(operation[1] for operation in operations if operation[0] == "later")
        for fold in folds:
            fold.now_ms += later_ms
        records = [record_of(single, operation, version) for operation in operations if operation[0] != "later"]
        for record in records:
            single.fold(record)
        rebuilt.restart()
        assert running.step(*records) == rebuilt.step(*records)
        assert running.stored() == rebuilt.stored()
        assert reservations(running) == reservations(single)
        assert stored_one_by_one(running) == stored_one_by_one(single)
        for tenant in (FLAT, ROOT, CHILD):
            assert usage_of(running, tenant).running == sum(tenant in chain for _, chain, _ in reservations(running))
    dead = [[(offset, str(error)) for offset, error in fold.dead] for fold in folds]
    assert dead[0] == dead[1] == dead[2]


def reservations(fold):
    """Each open job once, and at which levels it holds a slot."""
    held = [(job, value.chain, value.source) for value in stored(fold).values() for job in value.jobs]
    assert len({job for job, _, _ in held}) == len(held)
    assert all(len(value.jobs) <= TOGETHER_MAX for value in stored(fold).values())
    return sorted(held)


def stored_one_by_one(fold):
    """What is stored, but for what is stored together: that depends on the steps."""
    return {key: value for key, value in fold.stored().items() if not key.startswith(("seen/", "jobs/"))}
