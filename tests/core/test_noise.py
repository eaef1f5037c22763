"""The noise folds as black boxes: exact sums, partials that repeat harmlessly, and verdicts that restarts keep."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from settler_streams.agents import noisy_neighbour
from settler_streams.core import noise
from settler_streams.core.noise import GRID, POLICY, STANDSTILL_MS, TICK_MS, NoisyDetector, NoisyNeighbour, Rounds
from settler_streams.events import (
    ClockTick,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobStatus,
    QueuePriority,
    Resource,
    TenantNoisy,
    TenantQuiet,
    TenantSums,
    UsagePartial,
    UsageRecorded,
    decode,
    encode,
    envelope,
)
from settler_streams.ids import PLATFORM, derived_id
from settler_streams.topology import load_topology
from tests.core.harness import START_MS, Fold, uid

TENANTS = [uid(f"tenant {n}") for n in range(6)]
ROOT = uid("the root")
TICK = ClockTick(role="admission")
WINDOW = START_MS // GRID.width_ms


def new_partition(number=0):
    return Fold(lambda state: NoisyNeighbour(state, number), partition=number)


def decided(at_ms):
    return JobDecided(
        job_id=uid("j"),
        admitted=True,
        kind="reconciliation",
        priority=QueuePriority.NORMAL,
        requested_at_ms=at_ms,
        decided_at_ms=at_ms,
    )


def done(at_ms, worker_us):
    return JobFinished(
        job_id=uid("j"),
        status=JobStatus.SUCCEEDED,
        attempt=1,
        kind="reconciliation",
        requested_at_ms=0,
        finished_at_ms=at_ms,
        worker_us=worker_us,
    )


def stored(quantity, resource=Resource.STORAGE_BYTES):
    return UsageRecorded(resource=resource, quantity=quantity)


def merged(partials):
    """The newest sums of each chunk, as the detector must see them: window, tenant, amounts."""
    newest = {}
    for partial in partials:
        key = (partial.partition, partial.window_start_ms, partial.chunk)
        if key not in newest or newest[key].revision < partial.revision:
            newest[key] = partial
    total = {}
    for partial in newest.values():
        for sums in partial.sums:
            place = (partial.window_start_ms // GRID.width_ms, sums.tenant)
            total.setdefault(place, Counter()).update(
                requests=sums.requests, worker_us=sums.worker_us, storage_bytes=sums.storage_bytes
            )
    return total


tenants = st.sampled_from(TENANTS)
times = st.integers(-3, 2).map(lambda windows: windows * GRID.width_ms)
inputs = st.lists(
    st.one_of(
        st.tuples(st.just("decided"), tenants, times),
        st.tuples(st.just("done"), tenants, times, st.integers(0, 10**6)),
        st.tuples(st.just("stored"), tenants, times, st.integers(-5, 5)),
        st.tuples(st.just("domains"), tenants, times, st.integers(1, 5)),
        st.tuples(st.just("misplaced")),
        st.tuples(st.just("foreign"), tenants),
        st.tuples(st.just("tick")),
        st.tuples(st.just("later"), st.sampled_from([1, 500, 1_000, 2_000, 30_000])),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


def input_of(fold, step):
    match step:
        case ("decided", tenant, off_ms):
            return fold.record(decided(fold.now_ms + off_ms), tenant, key=ROOT)
        case ("done", tenant, off_ms, worker_us):
            return fold.record(done(fold.now_ms + off_ms, worker_us), tenant, key=ROOT)
        case ("stored", tenant, off_ms, quantity):
            return fold.record(stored(quantity), tenant, key=ROOT, time_ms=fold.now_ms + off_ms)
        case ("domains", tenant, off_ms, quantity):
            body = stored(quantity, Resource.CUSTOM_DOMAINS)
            return fold.record(body, tenant, key=ROOT, time_ms=fold.now_ms + off_ms)
        case ("misplaced",):
            return fold.record(JobCancelRequested(job_id=uid("j")))
        case ("foreign", tenant):
            return fold.record(stored(1), tenant, key="somebody")
    return fold.record(TICK)


def count(wanted, fold, step, ticked_ms):
    """The oracle: every amount in the window of its time, clamped to those that were still open at the last tick."""
    if step[0] not in ("decided", "done", "stored"):
        return
    oldest = (max(ticked_ms, fold.now_ms - STANDSTILL_MS) - GRID.lateness_ms) // GRID.width_ms
    window = min(max((fold.now_ms + step[2]) // GRID.width_ms, oldest), fold.now_ms // GRID.width_ms)
    name = {"decided": "requests", "done": "worker_us", "stored": "storage_bytes"}[step[0]]
    sums = wanted.setdefault((window, step[1]), Counter())
    sums[name] += 1 if step[0] == "decided" else max(0, step[3])


@settings(max_examples=200, deadline=None)
@given(inputs, st.integers(1, 4))
def test_partials_carry_every_amount_once_and_restarts_change_nothing(sequence, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "CHUNK_TENANTS_MAX", chunk)
        fold, restarted, spared, wanted, ticked_ms = new_partition(), new_partition(), new_partition(), {}, 0
        for step in [*sequence, ("tick",)]:
            if step[0] == "later":
                fold.now_ms += step[1]
            elif step[0] == "restart":
                restarted.restart()
            else:
                restarted.now_ms = spared.now_ms = fold.now_ms
                record = input_of(fold, step)
                fold.fold(record)
                restarted.fold(record)
                count(wanted, fold, step, ticked_ms)
                if step[0] == "tick":
                    ticked_ms = fold.now_ms
                if step[0] not in ("misplaced", "foreign"):
                    spared.fold(record)
        partials = [emit.data for emit in fold.emitted(UsagePartial)]
        assert merged(partials) == wanted
        assert all(len(partial.sums) <= chunk for partial in partials)
        assert len(fold.dead) == sum(step[0] in ("misplaced", "foreign") for step in sequence)
        for twin in (restarted, spared):
            assert [outcome.emits for outcome in twin.outcomes] == [outcome.emits for outcome in fold.outcomes]
            assert twin.stored() == fold.stored()


def test_a_tick_that_is_in_the_log_twice_sends_partials_under_different_ids():
    fold, ids = new_partition(), []
    fold.feed(TICK)
    for number in range(2):
        fold.feed(decided(fold.now_ms), TENANTS[number])
        tick = fold.record(TICK, PLATFORM, event_id=uid("tick"))
        ids += [derived_id(tick.event.id, emit.suffix) for emit in fold.fold(tick)]
    assert len(ids) == len(set(ids)) == 2


def test_old_windows_are_forgotten():
    fold = new_partition()
    fold.feed(decided(fold.now_ms), TENANTS[0], key=ROOT)
    fold.feed(TICK)
    fold.now_ms += GRID.kept * GRID.width_ms
    assert all(not emit.data.sums for emit in fold.feed(TICK)), "nothing has changed"
    assert [key for key in fold.state if key.startswith("sum/")] == []


def test_of_each_window_an_idle_partition_says_once_that_it_is_empty():
    fold, said = new_partition(), []
    for second in range(4):
        fold.now_ms = START_MS + 1_000 * second
        for _ in range(2):
            said += [(emit.data.window_start_ms, emit.data.sums) for emit in fold.feed(TICK)]
        fold.restart()
    assert said == [(START_MS, ()), (START_MS + GRID.width_ms, ())]
    fold.feed(decided(fold.now_ms), TENANTS[0], key=ROOT)
    assert [len(emit.data.sums) for emit in fold.feed(TICK)] == [1], "and sends its sums once there are some"
    event = envelope(
        fold.emitted(UsagePartial)[0].data,
        event_id=uid("e"),
        source="/s",
        tenant=PLATFORM,
        time=fold.record(TICK).event.time,
    )
    assert decode(encode(event)) == event


def test_a_partition_that_had_not_said_so_before_goes_on():
    """Stored by the version that told no empty windows."""
    fold = new_partition()
    fold.feed(decided(fold.now_ms), TENANTS[0], key=ROOT)
    fold.state.apply({"rounds/": Rounds(0)})
    fold.restart()
    assert [len(emit.data.sums) for emit in fold.feed(TICK)] == [1]


def test_every_partial_is_an_event_that_the_detector_can_read():
    """Whatever amounts events can hold; a single unreadable sum would lose its whole chunk."""
    fold = new_partition()
    for _ in range(3):
        fold.feed(stored(2**63 - 1), TENANTS[0], key=ROOT)
        fold.feed(done(fold.now_ms, 2**63 - 1), TENANTS[1], key=ROOT)
    fold.feed(stored(1), TENANTS[2], key="not a tenant")
    (partial,) = fold.feed(TICK)
    event = envelope(partial.data, event_id=uid("e"), source="/s", tenant=PLATFORM, time=fold.record(TICK).event.time)
    assert decode(encode(event)) == event
    assert fold.reasons() == ["foreign-tenant"]
    fold.restart()


def partial(window, sums, revision=1, partition=0, chunk=0):
    return UsagePartial(
        partition=partition,
        window_start_ms=window * GRID.width_ms,
        window_ms=GRID.width_ms,
        revision=revision,
        chunk=chunk,
        sums=tuple(TenantSums(tenant=tenant, root=ROOT, requests=amount) for tenant, amount in sums.items()),
    )


PARTITIONS = 3
CLOSING = 1 + GRID.lateness_ms // GRID.width_ms
"""So many windows later a window is closed."""


def judge(fold, window):
    """Tick when ``window`` has just become final, and every partition has said so."""
    fold.now_ms = (window + 1) * GRID.width_ms + GRID.lateness_ms + TICK_MS
    for number in range(PARTITIONS):
        fold.feed(partial(window + CLOSING, {}, 0, number))
    return [emit.data for emit in fold.feed(TICK)]


def run(fold, usage_by_window, first=WINDOW):
    """Feed and judge one window after another. Returns (window, verdict) pairs."""
    verdicts = []
    for window, sums in enumerate(usage_by_window, start=first):
        if sums:
            fold.feed(partial(window, sums))
        verdicts += [(window - first, type(body)) for body in judge(fold, window)]
    return verdicts


def new_detector():
    return Fold(lambda state: NoisyDetector(state, PARTITIONS))


LOUD = {TENANTS[0]: 400} | dict.fromkeys(TENANTS[1:], 100)
EVEN = dict.fromkeys(TENANTS, 100)


def test_above_three_times_the_others_is_noisy_after_three_of_five_windows_and_quiet_after_five():
    fold = new_detector()
    assert run(fold, [LOUD] * 4 + [EVEN] * 6) == [(2, TenantNoisy), (8, TenantQuiet)]
    (noisy,), (quiet,) = fold.emitted(TenantNoisy), fold.emitted(TenantQuiet)
    assert (noisy.tenant, noisy.key, noisy.data.resource) == (TENANTS[0], ROOT, "requests")
    assert (noisy.data.used, noisy.data.others_average, noisy.data.ratio_per_mille) == (400, 100, 4_000)
    assert quiet.data.noisy_for_ms == 6 * GRID.width_ms
    assert not [key for key in fold.state if key.startswith(("watch/", "partial/"))], "nothing is left behind"


@pytest.mark.parametrize(
    "windows",
    [
        [EVEN] * 12,
        [{TENANTS[0]: 300} | dict.fromkeys(TENANTS[1:], 100)] * 12,
        [LOUD, EVEN, EVEN, EVEN, LOUD, EVEN] * 3,
        [{TENANTS[0]: 19}] * 12,
        [{TENANTS[0]: 10**6}] * 12,
        [{}] * 12,
    ],
    ids=["even", "exactly three times", "short bursts", "below the floor", "nobody else", "silence"],
)
def test_no_alarm(windows):
    assert run(new_detector(), windows) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(50, 149), min_size=6, max_size=6), min_size=1, max_size=15))
def test_balanced_tenants_never_alarm(windows):
    """Nobody can be above three times an average when all lie within a factor of three."""
    assert run(new_detector(), [dict(zip(TENANTS, amounts, strict=True)) for amounts in windows]) == []


def test_silence_is_judged_too_so_a_noisy_tenant_that_stops_is_released():
    assert run(new_detector(), [LOUD] * 3 + [{}] * 5) == [(2, TenantNoisy), (7, TenantQuiet)]


def test_a_silent_window_counts_although_a_later_one_has_usage_already():
    fold = new_detector()
    run(fold, [LOUD] * 3)
    for window in range(WINDOW + 3, WINDOW + 8):
        if window == WINDOW + 4:
            fold.feed(partial(WINDOW + 8, EVEN))
        bodies = judge(fold, window)
        assert [type(body) for body in bodies] == ([TenantQuiet] if window == WINDOW + 7 else [])


def test_a_window_is_judged_only_when_it_can_no_longer_change():
    fold = new_detector()
    for window in range(WINDOW, WINDOW + 3):
        fold.feed(partial(window, LOUD))
    final_ms = (WINDOW + 3) * GRID.width_ms + GRID.lateness_ms + TICK_MS
    fold.now_ms = final_ms - 1
    for number in range(PARTITIONS):
        fold.feed(partial(WINDOW + 2 + CLOSING, {}, 0, number))
    assert fold.feed(TICK) == ()
    fold.now_ms = final_ms
    assert len(fold.feed(TICK)) == 1
    before = fold.stored()
    fold.feed(partial(WINDOW + 2, EVEN, revision=99))
    assert fold.stored() == before, "what comes after the verdict changes nothing"
    assert fold.feed(TICK) == ()


def test_a_verdict_comes_within_ten_seconds():
    fold = new_detector()
    assert run(fold, [LOUD] * 3) == [(2, TenantNoisy)]
    assert POLICY.enter * GRID.width_ms <= fold.now_ms - WINDOW * GRID.width_ms <= 10_000


def test_ratios_that_no_event_can_hold_are_cut():
    fold = new_detector()
    others = {TENANTS[1]: 1} | dict.fromkeys(TENANTS[2:], 0)
    for window in range(WINDOW, WINDOW + 3):
        for partition in range(2):
            fold.feed(partial(window, {TENANTS[0]: 2**63 - 1} | others, partition=partition))
        judge(fold, window)
    (emit,) = fold.emitted(TenantNoisy)
    event = envelope(emit.data, event_id=uid("e"), source="/s", tenant=PLATFORM, time=fold.record(TICK).event.time)
    assert decode(encode(event)) == event


waiting = st.lists(st.dictionaries(tenants, st.sampled_from([0, 20, 70, 400])), max_size=STANDSTILL_MS // GRID.width_ms)


@settings(max_examples=150, deadline=None)
@given(waiting)
@example([LOUD] * 3 + [EVEN] * 17)
@example([{TENANTS[4]: 15}] + [{TENANTS[0]: 70, TENANTS[1]: 20}] * 3)
def test_it_does_not_matter_how_many_windows_are_judged_at_a_tick(windows):
    """As many as a standstill may leave."""
    by_one, at_once = new_detector(), new_detector()
    run(by_one, windows)
    for window, sums in enumerate(windows, start=WINDOW):
        at_once.feed(partial(window, sums))
    judge(at_once, WINDOW + len(windows) - 1)
    for kind in (TenantNoisy, TenantQuiet):
        assert at_once.emitted(kind) == by_one.emitted(kind)


deliveries = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 4)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(st.data(), deliveries)
def test_partials_are_idempotent_and_their_order_does_not_matter(data, sent):
    """(partition, chunk, revision): whatever order and however often, the greatest revision counts."""

    def body(partition, chunk, revision):
        mine = TENANTS[3 * partition + chunk : 3 * partition + chunk + 1]
        return [partial(w, dict.fromkeys(mine, 100 * revision), revision, partition, chunk) for w in windows]

    windows = range(WINDOW, WINDOW + 4)
    once = [max((s for s in sent if s[:2] == place), key=lambda s: s[2]) for place in sorted({s[:2] for s in sent})]
    answers = []
    for order in (once, data.draw(st.permutations(sent + sent))):
        fold = new_detector()
        for one in order:
            for event in body(*one):
                fold.feed(event)
        before = {key: value for key, value in fold.stored().items() if key.startswith("partial/")}
        verdicts = [judge(fold, window) for window in windows]
        answers.append((before, verdicts))
    assert answers[0] == answers[1]


detector_steps = st.lists(
    st.one_of(
        st.tuples(st.just("idle"), st.integers(-1, 3), st.integers(0, PARTITIONS)),
        st.tuples(st.just("partial"), st.integers(-1, 3), st.integers(0, 2), st.integers(1, 9), st.integers(0, 5)),
        st.tuples(st.just("partial"), st.integers(-1, 3), st.integers(0, 2), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("tick")),
        st.tuples(st.just("tick")),
        st.tuples(st.just("later"), st.sampled_from([500, 1_000, 2_000, 2_000, 40_000])),
        st.tuples(st.just("misplaced")),
        st.tuples(st.just("restart")),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(detector_steps)
def test_the_detector_is_the_same_after_any_restart(sequence):
    fold, twin, spared = new_detector(), new_detector(), new_detector()
    for step in sequence:
        if step[0] == "later":
            fold.now_ms += step[1]
            continue
        if step[0] == "restart":
            twin.restart()
            continue
        twin.now_ms = spared.now_ms = fold.now_ms
        match step:
            case ("partial", off, partition, revision, loud):
                sums = dict.fromkeys(TENANTS, 100) | {TENANTS[loud]: 1_000}
                record = fold.record(partial(fold.now_ms // GRID.width_ms + off, sums, revision, partition))
            case ("idle", off, partition):
                record = fold.record(partial(fold.now_ms // GRID.width_ms + off, {}, 0, partition))
            case ("misplaced",):
                record = fold.record(decided(0))
            case _:
                record = fold.record(TICK)
        for one in (fold, twin, *([] if step[0] == "misplaced" else [spared])):
            one.fold(record)
    for other in (twin, spared):
        assert [outcome.emits for outcome in other.outcomes] == [outcome.emits for outcome in fold.outcomes]
        assert other.stored() == fold.stored()
    states = {}
    for emit in (e for outcome in fold.outcomes for e in outcome.emits):
        place = (emit.tenant, emit.data.resource)
        assert states.get(place) is not type(emit.data), "noisy and quiet take turns"
        assert place in states or isinstance(emit.data, TenantNoisy)
        states[place] = type(emit.data)


def test_the_detector_waits_for_every_tenant_partition():
    topology = load_topology()
    fold = Fold(lambda state: noisy_neighbour.new_detector(state, 0, topology))
    fold.now_ms += STANDSTILL_MS // 2 + TICK_MS
    now = fold.now_ms // GRID.width_ms
    judged = []
    for number in range(topology.tenant_partitions):
        fold.feed(partial(now, {}, 0, number))
        fold.feed(TICK)
        judged.append(fold.state["judged/"].window)
    assert judged[-1] == now - CLOSING
    assert set(judged[:-1]) == {(fold.now_ms - STANDSTILL_MS - GRID.lateness_ms) // GRID.width_ms - 1}


def test_a_detector_that_had_heard_of_no_partition_goes_on():
    """Stored by the version that judged by its own ticks: one window."""
    fold = new_detector()
    assert run(fold, [LOUD] * 3) == [(2, TenantNoisy)]
    fold.state.apply({"judged/": fold.codec.decode("judged/", b"\x01\x91" + msgspec.msgpack.encode(WINDOW + 2))})
    fold.restart()
    assert run(fold, [EVEN] * 5, first=WINDOW + 3) == [(4, TenantQuiet)]
