"""Stored state: two formats are read, everything else stops the worker; an overlay is the state or it is nothing."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.fold import CLOCK_KEY, FoldClock, Value, value_of
from settler_streams.errors import StateError
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.workers.folds import FOLDS


class Level(Value, frozen=True, array_like=True):
    """A value in its second format; the first knew no unit."""

    FORMAT: ClassVar[int] = 2

    amount: int
    unit: str

    @classmethod
    def from_previous(cls, payload):
        (amount,) = msgspec.msgpack.decode(payload, type=tuple[int])
        return cls(amount, "litre")


CODEC = StateCodec({"level": Level, "clock": FoldClock})
STORED = b"\x02" + msgspec.msgpack.encode([7, "pint"])


def test_a_value_starts_with_its_format():
    assert CODEC.encode(Level(7, "pint")) == STORED
    assert CODEC.decode("level/a/b", STORED) == Level(7, "pint")


def test_the_previous_format_is_still_read_and_written_back_in_the_present_one():
    value = CODEC.decode("level/a", b"\x01" + msgspec.msgpack.encode([7]))
    assert value == Level(7, "litre")
    assert CODEC.encode(value)[0] == 2


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("level/a", b""),
        ("level/a", b"\x00" + STORED[1:]),
        ("level/a", b"\x03" + STORED[1:]),
        ("level/a", b"\x02"),
        ("level/a", STORED[:-1]),
        ("level/a", STORED + b"\x00"),
        ("level/a", b"\x02" + msgspec.msgpack.encode(["seven", "pint"])),
        ("level/a", b"\x01" + msgspec.msgpack.encode(["seven"])),
        ("clock/", b"\x00" + msgspec.msgpack.encode([1])),
        ("unheard/a", STORED),
        ("", STORED),
    ],
)
def test_anything_else_stops_the_worker_and_names_the_key(key, stored):
    with pytest.raises(StateError) as caught:
        CODEC.decode(key, stored)
    assert repr(key) in str(caught.value)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=40))
def test_no_stored_bytes_give_anything_but_a_value_or_a_state_error(stored):
    outcome = None
    try:
        outcome = CODEC.decode("level/a", stored)
    except StateError as error:
        outcome = error
    assert isinstance(outcome, Level | StateError)


@pytest.mark.parametrize("role", sorted(FOLDS))
def test_every_role_stores_its_clock_and_kinds_that_are_frozen_values(role):
    kinds = FOLDS[role].kinds
    assert kinds[CLOCK_KEY.rstrip("/")] is FoldClock
    for prefix, kind in kinds.items():
        assert "/" not in prefix
        assert issubclass(kind, Value)
        assert kind.__struct_config__.frozen
        assert kind.__struct_config__.array_like
        assert 1 <= kind.FORMAT <= 255
        assert kind.__doc__


def test_a_value_of_another_kind_is_never_taken_for_the_right_one():
    overlay = Overlay()
    overlay.load("level/a", FoldClock(1))
    with pytest.raises(TypeError, match="holds FoldClock"):
        value_of(overlay, "level/a", Level)
    assert value_of(overlay, "level/b", Level) is None


keys = st.sampled_from(["a", "b", "c", "d"])
values = st.one_of(st.none(), st.integers(0, 3).map(FoldClock))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.dictionaries(keys, values, max_size=3)),
        st.tuples(st.just("apply"), st.dictionaries(keys, values, max_size=3)),
        st.tuples(st.just("load"), keys, values),
        st.tuples(st.just("merge")),
        st.tuples(st.just("discard")),
    ),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_an_overlay_equals_two_dictionaries(sequence):
    overlay, committed, seen = Overlay(), {}, {}
    for step in sequence:
        match step:
            case ("apply", changes):
                overlay.apply(changes)
                for key, value in changes.items():
                    seen = {k: v for k, v in seen.items() if k != key} | ({} if value is None else {key: value})
            case ("load", key, value):
                if overlay.changes:
                    continue  # a session loads before its first step
                overlay.load(key, value)
                seen = {k: v for k, v in seen.items() if k != key} | ({} if value is None else {key: value})
                committed = dict(seen)
            case ("merge",):
                changed = dict(overlay.changes)
                overlay.merge()
                assert {k for k in committed | seen if committed.get(k) != seen.get(k)} <= set(changed)
                committed = dict(seen)
            case ("discard",):
                overlay.discard()
                seen = dict(committed)
        assert dict(overlay) == seen
        assert dict(overlay.committed) == committed
        assert len(overlay.committed) == len(committed)
        assert overlay.committed.get("a") == committed.get("a")
        assert len(overlay) == len(seen)
        assert len(list(overlay)) == len(set(overlay)), "each key once"
        for key in "abcd":
            assert overlay.get(key) == seen.get(key)
            assert (key in overlay) == (key in seen)
        if step[0] in ("merge", "discard"):
            assert overlay.changes == {}


def test_each_key_is_written_once_per_step_with_its_last_value():
    overlay = Overlay()
    for now_ms in (1, 2, 3):
        overlay.apply({"clock/": FoldClock(now_ms)})
    assert overlay.changes == {"clock/": FoldClock(3)}
    overlay.apply({"clock/": None})
    assert overlay.changes == {"clock/": None}, "a deletion is written too: the changelog needs its tombstone"


def test_a_read_is_the_dictionarys_own():
    """The decisions read through it a dozen times per record."""
    overlay = Overlay()
    assert overlay.get == overlay._values.get
