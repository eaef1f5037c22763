"""Trace contexts: a header is carried on if it can be one, and never becomes an event that its reader refuses."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from settler_streams.core.arrivals import arrivals_of
from settler_streams.core.places import Places
from settler_streams.events import FileRecords, JobRequested, JobsEnqueued, MatchRules, decode, encode, envelope
from settler_streams.runtime.intake import TRACEPARENT, TRACEPARENT_BYTES_MAX, traceparent_of
from tests.core.harness import START_MS, Fold, uid
from tests.core.test_admission import FLAT, new_fold

W3C = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def found(*values):
    return traceparent_of(SimpleNamespace(headers=[("other", b"x"), *((TRACEPARENT, value) for value in values)]))


@pytest.mark.parametrize("value", [W3C, W3C + b"-more", b"~" * TRACEPARENT_BYTES_MAX, b'"\\u0000{'])
def test_what_can_be_a_trace_context_is_carried_on_to_the_job(value):
    assert found(value) == value
    fold: Fold = new_fold()
    rows = FileRecords(path="a.csv", format="csv")
    asked = fold.record(JobRequested(left=rows, right=rows, rules=MatchRules()), FLAT, event_id=uid("a"))
    places = Places(pools=1)
    assert places.add(msgspec.structs.replace(asked, traceparent=value), asked.event.data, START_MS) == ()
    (emit,) = places.take(FLAT)
    read = decode(encode(envelope(emit.data, emit.event_id, "/test", FLAT, asked.event.time))).data
    assert isinstance(read, JobsEnqueued)
    assert [arrival.traceparent for arrival in arrivals_of(read)] == [value]


@pytest.mark.parametrize(
    "value",
    [None, b"", b"\0", W3C + b"\0", W3C + b"\n", b"a b", b"\xff", "é".encode(), b"x" * (TRACEPARENT_BYTES_MAX + 1)],
)
def test_what_cannot_be_one_is_passed_over(value):
    assert found(value) is None
    assert found(value, W3C) == W3C
