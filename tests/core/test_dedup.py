"""Duplicates: the same (source, id) within the window is one event; a restart remembers exactly as much."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core import dedup
from settler_streams.core.dedup import SEEN_WINDOW_MS, SeenIds, SeenWindow
from settler_streams.core.fold import NOTHING, FoldClock, FoldLogic, Outcome
from settler_streams.errors import RecordError
from settler_streams.events import ClockTick
from tests.core.harness import Fold, uid


class Remembering(FoldLogic):
    """The smallest fold: it remembers every record, and forgets at each tick."""

    kinds = {"clock": FoldClock, "seen": SeenIds}  # noqa: RUF012 - a protocol's class variable

    def __init__(self, state):
        self.seen = SeenWindow(state)

    def decide(self, record, now_ms):
        if record.event.data.role == "tick":
            self.seen.forget(now_ms)
        elif not self.seen.repeated(record, now_ms):
            self.seen.remember(record, now_ms)
        return NOTHING

    def settle(self):
        return Outcome(self.seen.settle())


def send(fold, number, source="/a"):
    fold.feed(ClockTick(role="event"), event_id=uid(f"e{number}"), source=source)


def remembered(fold):
    return list(fold.logic.seen)


def test_the_window_ends_to_the_millisecond():
    fold = Fold(Remembering)
    send(fold, 1)
    fold.now_ms += SEEN_WINDOW_MS - 1
    fold.feed(ClockTick(role="tick"))
    assert remembered(fold) == [uid("e1")]
    fold.now_ms += 1
    fold.feed(ClockTick(role="tick"))
    assert remembered(fold) == []
    assert fold.stored() == {}


def test_an_id_of_another_source_is_no_duplicate_but_a_conflict():
    fold = Fold(Remembering)
    send(fold, 1)
    with pytest.raises(RecordError, match="id-conflict"):
        fold.logic.decide(fold.record(ClockTick(role="event"), event_id=uid("e1"), source="/b"), fold.now_ms)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 9)),
        st.tuples(st.just("send"), st.integers(0, 9)),
        st.tuples(st.just("later"), st.sampled_from([0, 1, SEEN_WINDOW_MS // 3, SEEN_WINDOW_MS])),
        st.tuples(st.just("tick")),
        st.tuples(st.just("restart")),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 6))
def test_window_and_bound_equal_a_list_kept_by_hand(sequence, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "SEEN_MAX", most)
        fold, kept = Fold(Remembering), []
        twin = Fold(Remembering)
        for step in sequence:
            match step:
                case ("later", gap_ms):
                    fold.now_ms = twin.now_ms = fold.now_ms + gap_ms
                case ("restart",):
                    twin.restart()
                case ("tick",):
                    fold.feed(ClockTick(role="tick"))
                    twin.feed(ClockTick(role="tick"))
                    kept = [entry for entry in kept if entry[0] > fold.now_ms - SEEN_WINDOW_MS]
                case ("send", number):
                    send(fold, number)
                    send(twin, number)
                    kept = [entry for entry in kept if entry[0] > fold.now_ms - SEEN_WINDOW_MS]
                    if number not in [entry[1] for entry in kept]:
                        kept.append((fold.now_ms, number))
                        kept = kept[-most:]
            assert remembered(fold) == remembered(twin) == [uid(f"e{number}") for _, number in kept]
            assert twin.stored() == fold.stored()


def test_the_ids_of_a_step_are_stored_together_and_go_together(monkeypatch):
    monkeypatch.setattr(dedup, "CHUNK_IDS_MAX", 4)
    fold = Fold(Remembering)
    for number in range(10):
        fold.logic.decide(fold.record(ClockTick(role="event"), event_id=uid(f"e{number}")), fold.now_ms + number)
    fold.state.apply(fold.logic.settle().changes)
    fold.state.merge()
    assert [len(value.entries) for value in fold.state.values()] == [4, 4, 2]
    twin = Fold(Remembering)
    twin.state, twin.logic = fold.state, fold.new_logic(fold.state)
    assert remembered(twin) == [uid(f"e{number}") for number in range(10)]
    for one in (fold, twin):
        one.logic.seen.forget(fold.now_ms + 4 + SEEN_WINDOW_MS)
        assert one.logic.settle().changes == {"seen/0000000000000000": None}
        assert remembered(one) == [uid(f"e{number}") for number in range(5, 10)]
