"""How webhooks are signed and when they are tried again."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settler_streams.core import webhooks
from settler_streams.core.webhooks import (
    backoff_s,
    event_types,
    lane_pause_s,
    retry_after_s,
    secret_text,
    signed_headers,
)
from settler_streams.errors import InvalidRequestError
from settler_streams.events import REGISTRY

NOW_S = 1_772_357_400.0  # 2026-03-01 09:30:00 UTC
DAY_S = 86_400


def test_the_signature_is_the_one_that_others_publish() -> None:
    """The example that libraries of the specification test themselves with."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_each_secret_in_force_signs() -> None:
    both = signed_headers([b"new", b"old"], "id", 1, b"body")["webhook-signature"].split(" ")
    assert both == [signed_headers([one], "id", 1, b"body")["webhook-signature"] for one in (b"new", b"old")]
    assert secret_text(b"\0" * 32) == "whsec_" + "A" * 43 + "="


def test_tenants_may_ask_for_public_types_alone() -> None:
    assert set(REGISTRY) >= webhooks.PUBLIC_TYPES
    assert event_types(sorted(webhooks.PUBLIC_TYPES) * 2) == sorted(webhooks.PUBLIC_TYPES)
    for private in ("settler.tenant.usage.v1", "settler.tenant.acknowledged.v1", "settler.job.requested.v1", "*"):
        with pytest.raises(InvalidRequestError, match="no such event types"):
            event_types([private])


@given(st.integers(1, 10_000), st.floats(-1, 1), st.floats(0, 3600))
def test_delays_stay_within_their_bounds(attempts: int, jitter: float, asked_s: float) -> None:
    delay = backoff_s(attempts, jitter, asked_s)
    assert asked_s <= delay
    assert 3.75 <= delay <= 4 * 3600 * 1.25
    assert 1 <= lane_pause_s(attempts) <= 60
    assert lane_pause_s(attempts, asked_s) >= asked_s


def test_a_day_has_room_for_seventeen_tries() -> None:
    at_s, tries = 0.0, 1
    while (at_s := at_s + backoff_s(tries, 0)) < DAY_S:
        tries += 1
    assert tries == 17
    assert sum(backoff_s(attempt, 0) for attempt in range(1, 13)) < 6 * 3600


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("99999999999999999999", 3600.0),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("²", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("Sun, 01 Mar 2026 09:31:00 GMT", 60.0),
        ("Sun, 01 Mar 2026 09:00:00 GMT", 0.0),
        ("Fri, 01 Mar 2999 09:00:00 GMT", 3600.0),
    ],
)
def test_what_an_endpoint_asks_for_is_heard_within_bounds(asked: str, seconds: float) -> None:
    assert retry_after_s({"retry-after": asked}, NOW_S) == seconds
    assert retry_after_s({}, NOW_S) == 0.0
