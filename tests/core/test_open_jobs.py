"""Open jobs are stored a few together: which, when they are written again, and that nothing of them stays."""

from __future__ import annotations

import msgspec

from settler_streams.core.open_jobs import TOGETHER_MAX, Reservation, Reservations
from settler_streams.events import TenantErased
from tests.core.harness import uid
from tests.core.test_admission import CHILD, FLAT, ROOT, change, finish, known, request, usage_of
from tests.core.test_places import one_step


def asked(fold, name, tenant=FLAT, **where):
    return fold.record(request(), tenant, event_id=uid(name), **where)


def ended(fold, name, tenant=FLAT):
    return fold.record(finish(uid(name)), tenant)


def stored(fold):
    """What is stored of open jobs, by key."""
    return {key: value for key, value in fold.state.items() if isinstance(value, Reservations | Reservation)}


def names(*of):
    return tuple(uid(name) for name in of)


def test_jobs_of_one_tenant_that_a_step_admits_are_stored_together():
    fold = known((FLAT, {}), (ROOT, {}), (CHILD, {}))
    first = asked(fold, "a")
    other = asked(fold, "b", CHILD, key=ROOT)
    one_step(fold, first, other, asked(fold, "c"))
    assert stored(fold) == {
        f"jobs/{first.offset}": Reservations(FLAT, (FLAT,), "/test", names("a", "c")),
        f"jobs/{other.offset}": Reservations(CHILD, (CHILD, ROOT), "/test", names("b")),
    }
    one_step(fold, later := asked(fold, "d"))
    assert stored(fold)[f"jobs/{later.offset}"].jobs == names("d"), "a later step's are not added to what is stored"


def test_a_job_that_ends_leaves_the_others_and_the_last_one_leaves_nothing():
    fold = known((FLAT, {}))
    first = asked(fold, "a")
    one_step(fold, first, asked(fold, "b"), asked(fold, "c"))
    fold.restart()
    one_step(fold, ended(fold, "a"))
    assert stored(fold)[f"jobs/{first.offset}"].jobs == names("b", "c")
    fold.restart()
    one_step(fold, ended(fold, "c"), ended(fold, "b"), ended(fold, "a"))
    assert stored(fold) == {}
    assert usage_of(fold, FLAT).running == 0


def test_a_job_that_ends_in_the_step_that_admits_it_is_stored_with_no_other():
    fold = known((FLAT, {}))
    first = asked(fold, "a")
    one_step(fold, first, ended(fold, "a"), asked(fold, "b"))
    assert [value.jobs for value in stored(fold).values()] == [names("b")]
    assert usage_of(fold, FLAT).running == 1


def test_an_id_that_comes_again_while_its_former_neighbours_are_open_is_a_job_of_its_own():
    fold = known((FLAT, {}))
    one_step(fold, asked(fold, "a"), asked(fold, "b"))
    one_step(fold, ended(fold, "a"))
    fold.now_ms += 60 * 60_000
    again = asked(fold, "a", source="/another")
    one_step(fold, again)
    assert sorted(value.jobs for value in stored(fold).values()) == sorted([names("a"), names("b")])
    assert stored(fold)[f"jobs/{again.offset}"].source == "/another"


def test_only_a_few_are_stored_together():
    fold = known((FLAT, {}), open_jobs_max=1_000)
    one_step(fold, *(asked(fold, f"j{number}") for number in range(2 * TOGETHER_MAX + 1)))
    assert [len(value.jobs) for value in stored(fold).values()] == [TOGETHER_MAX, TOGETHER_MAX, 1]


def test_a_source_and_a_chain_are_those_of_all_that_are_stored_together():
    fold = known((ROOT, {}), (CHILD, {}), open_jobs_max=100)
    moved = msgspec.structs.replace(change(CHILD, version=9), parent_id=None)
    one_step(
        fold,
        asked(fold, "a", CHILD, key=ROOT, source="/one"),
        asked(fold, "b", CHILD, key=ROOT, source="/two"),
        asked(fold, "c", CHILD, key=ROOT, source="/two"),
        fold.record(moved, CHILD, key=ROOT),
        asked(fold, "d", CHILD, key=ROOT, source="/two"),
    )
    assert [(value.source, value.chain, value.jobs) for value in stored(fold).values()] == [
        ("/one", (CHILD, ROOT), names("a")),
        ("/two", (CHILD, ROOT), names("b", "c")),
        ("/two", (CHILD,), names("d")),
    ]
    one_step(fold, *(ended(fold, name, CHILD) for name in "abcd"))
    assert (usage_of(fold, CHILD).running, usage_of(fold, ROOT).running) == (0, 0)


def test_an_erased_tenants_jobs_are_gone_and_its_neighbours_untouched():
    fold = known((FLAT, {}), (ROOT, {}), (CHILD, {}))
    one_step(fold, asked(fold, "a", CHILD, key=ROOT), asked(fold, "b", ROOT), asked(fold, "c", CHILD, key=ROOT))
    one_step(fold, fold.record(TenantErased(version=9, root_id=ROOT), CHILD, key=ROOT))
    assert [value.jobs for value in stored(fold).values()] == [names("b")]
    assert usage_of(fold, ROOT).running == 1


def test_jobs_that_earlier_versions_have_stored_end_as_others_do():
    fold = known((FLAT, {}))
    one_step(fold, asked(fold, "a"))
    (key,) = stored(fold)
    fold.state.apply({key: None, f"job/{uid('a')}": Reservation(FLAT, (FLAT,), fold.now_ms, "/test")})
    fold.state.merge()
    fold.restart()
    assert one_step(fold, asked(fold, "a")) == [], "a repeat"
    assert list(stored(fold)) == [f"job/{uid('a')}"]
    one_step(fold, ended(fold, "a"))
    assert stored(fold) == {}
    assert usage_of(fold, FLAT).running == 0


def test_a_stored_value_is_small_however_many_levels_it_has():
    """What a lone job's end writes again, at the deepest chain and the longest source."""
    chain = tuple(uid(f"level {number}") for number in range(8))
    value = Reservations(chain[0], chain, "/" * 200, tuple(uid(f"j{number}") for number in range(TOGETHER_MAX)))
    assert len(msgspec.msgpack.encode(value)) < 1_500
