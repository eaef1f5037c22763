"""The codec: every unreadable record has a reason, nothing that kills Postgres gets in, and bytes are reproducible."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.errors import RecordError
from settler_streams.events import REGISTRY, ClockTick, FlagCommand, decode, encode, envelope
from settler_streams.events.fields import FlagAction, FlagScope
from settler_streams.ids import PLATFORM

ID = "0192f0c0-0000-7000-8000-000000000001"
TIME = dt.datetime(2026, 1, 2, 3, 4, 5, 678000, dt.UTC)
TICK = {
    "type": "settler.clock.tick.v1",
    "specversion": "1.0",
    "id": ID,
    "source": "/test",
    "time": "2026-01-02T03:04:05.678Z",
    "tenantid": PLATFORM,
    "data": {"role": "admission"},
}


def reason_of(value):
    with pytest.raises(RecordError) as caught:
        decode(value)
    return caught.value.reason


def with_(**changes):
    return json.dumps({name: value for name, value in (TICK | changes).items() if value is not ...}).encode()


def test_the_base_document_is_read():
    assert decode(with_()) == envelope(
        ClockTick(role="admission"), event_id=ID, source="/test", tenant=PLATFORM, time=TIME
    )


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        (b"", "empty"),
        (b" ", "not-json"),
        (b"{", "not-json"),
        (b"\xef\xbb\xbf" + with_(), "not-json"),
        (with_() + b"{}", "not-json"),
        (b'"\xff"', "not-json"),
        (with_().replace(b"/test", b"/\xff"), "not-json"),
        (with_().replace(b"/test", b"/\x00"), "not-json"),
        (with_().replace(b"/test", b"/\\ud800"), "not-json"),
        (with_().replace(b'"admission"', b"NaN"), "not-json"),
        (DEEP, "not-json"),
        (with_()[:-1] + b', "more": ' + DEEP + b"}", "not-json"),
        (with_(type="settler.unheard.of.v1")[:-1] + b', "more": ' + DEEP + b"}", "not-json"),
        (with_(source="a\x00b"), "nul-character"),
        (with_(data={"role": "x", "more": "\x00"}), "nul-character"),
        (with_(type="settler.clock.tick.v2"), "unknown-type"),
        (with_(type="x" * 10_000), "unknown-type"),
        (with_(type=5), "schema"),
        (with_(type=...), "schema"),
        (b"null", "schema"),
        (b"[]", "schema"),
        (with_(data=...), "schema"),
        (with_(data={"role": "Not A Name"}), "schema"),
        (with_(data={"role": "x", "sequence": 2**63}), "schema"),
        (with_(specversion="0.3"), "schema"),
        (with_(datacontenttype="text/plain"), "schema"),
        (with_(id=ID.upper()), "schema"),
        (with_(source=""), "schema"),
        (with_(source="x" * 201), "schema"),
        (with_(time="2026-01-02T03:04:05"), "schema"),
        (with_(time="2026-02-30T03:04:05Z"), "schema"),
        (with_(tenantid="me"), "schema"),
    ],
)
def test_what_cannot_be_read_says_why(value, reason):
    assert reason_of(value) == reason


@pytest.mark.parametrize("missing", ["id", "source", "time", "tenantid"])
def test_each_required_attribute_is_required(missing):
    assert reason_of(with_(**{missing: ...})) == "schema"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_decode_or_become_a_record_error(value):
    assert reason_of(value) in {"empty", "not-json", "nul-character", "unknown-type", "schema"}


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_document_is_never_worse_than_a_record_error(data):
    value = bytearray(with_())
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    reason = None
    try:
        event = decode(bytes(value))
    except RecordError as error:
        reason = error.reason
    else:
        assert decode(encode(event)) == event
    assert reason in {None, "not-json", "nul-character", "unknown-type", "schema"}


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.sampled_from(["\\", "u", "0", "\x00", "a", '"']), max_size=24))
def test_the_nul_character_is_found_exactly_when_a_string_holds_one(text):
    """Backslashes before ``u0000`` are counted: an escaped backslash followed by the letters is no NUL."""
    value = with_(source="/" + text)
    if "\x00" in text:
        assert reason_of(value) == "nul-character"
    else:
        assert decode(value).source == "/" + text


def test_unknown_fields_are_passed_over_in_envelope_and_body():
    value = with_(traceparent="00-1-2-01", data={"role": "x", "later": {"n": 1.5}})
    assert decode(value).data == ClockTick(role="x")


texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    texts,
    texts,
    st.sampled_from(FlagAction),
    st.integers(0, 1000),
    st.datetimes(min_value=dt.datetime(1, 1, 2), max_value=dt.datetime(9999, 12, 30), timezones=st.just(dt.UTC)),  # noqa: DTZ001
)
def test_encoding_is_deterministic_and_loses_nothing(actor, salt, action, per_mille, time):
    body = FlagCommand(
        flag="a.b", scope=FlagScope.TENANT, action=action, actor=actor, rollout_per_mille=per_mille, salt=salt
    )
    event = envelope(body, event_id=ID, source="/s", tenant=PLATFORM, time=time, subject="s")
    first = encode(event)
    assert decode(first) == event
    assert encode(decode(first)) == first
    assert event.time_ms == (time - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)


def test_another_process_writes_the_same_bytes():
    """Hash randomisation must not reorder anything that is sent."""
    program = (
        "import datetime as dt\n"
        "from settler_streams.events import *\n"
        "from settler_streams.events.fields import QuotaType, Resource\n"
        "body = TenantUsage(as_of_ms=1, window_start_ms=0, window_end_ms=2, used={r: 1 for r in Resource}, running=0,"
        " limits={q: 1 for q in QuotaType})\n"
        f"print(encode(envelope(body, event_id={ID!r}, source='/s', tenant={PLATFORM!r},"
        " time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC))).hex())\n"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert next(iter(runs)).strip()


def test_every_registered_type_carries_its_version():
    for event_type, body in REGISTRY.items():
        assert event_type.startswith("settler.")
        assert event_type.rpartition(".v")[2].isdecimal()
        assert body.event_type == event_type
        assert body.__doc__


@pytest.mark.parametrize(
    ("time", "time_ms"),
    [
        ("1969-12-31T23:59:59.999Z", -1),
        ("1970-01-01T00:00:00Z", 0),
        ("2026-01-02T05:04:05.6789+02:00", 1_767_323_045_678),
        ("0001-01-01T00:00:00+23:59", -62_135_683_140_000),
    ],
)
def test_an_events_time_is_in_whole_milliseconds_whatever_its_zone(time, time_ms):
    assert decode(with_(time=time)).time_ms == time_ms
