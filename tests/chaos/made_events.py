"""Records that producers send, as bytes: good ones of old and new writers, and poison of every kind.

Written with plain JSON from what the schemas say, so that nothing here depends on the code under test.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

ROWS = [
    {"id": "0", "reference": "a", "amount": "1.00", "currency": "EUR", "date": "2026-01-05"},
    {"id": "1", "reference": "b", "amount": "2.50", "currency": "EUR", "date": "2026-01-06"},
    {"id": "2", "reference": "c", "amount": "-3.10", "currency": "USD", "date": "2026-01-07"},
]
PRIORITIES = ("low", "normal", "high", "critical")
OVERSIZE_BYTES = 1_200_000
"""Beyond the contract's mebibyte, within what the broker takes."""

Event = dict[str, Any]


class Bad(NamedTuple):
    """A record that can never be decided: its bytes, and the key if it is not the tenant's."""

    value: bytes | None
    key: bytes | None


def event_id(chance: random.Random, now: dt.datetime) -> str:
    """A UUIDv7 whose random part comes from the seed."""
    value = int(now.timestamp() * 1000) << 80 | 0x7 << 76 | chance.getrandbits(12) << 64
    return str(uuid.UUID(int=value | 0b10 << 62 | chance.getrandbits(62)))


def event(kind: str, tenant: str, body: Event, chance: random.Random, at: dt.datetime | None = None) -> Event:
    """An envelope with ``body``."""
    now = dt.datetime.now(dt.UTC)
    return {
        "specversion": "1.0",
        "type": kind,
        "id": event_id(chance, now),
        "source": "/chaos",
        "time": (at or now).isoformat().replace("+00:00", "Z"),
        "tenantid": tenant,
        "data": body,
    }


def request_body(chance: random.Random) -> Event:
    """What a producer asks for: a small reconciliation of rows in the event itself."""
    left = chance.sample(ROWS, chance.randint(1, 3))
    right = chance.sample(ROWS, chance.randint(1, 3))
    body: Event = {
        "left": {"source": "inline", "rows": left},
        "right": {"source": "inline", "rows": right},
        "rules": {},
    }
    if chance.random() < 0.5:  # an older writer leaves out what has a default
        body |= {"kind": "reconciliation", "priority": chance.choice(PRIORITIES), "estimated_cost_us": 5_000}
    return body


def as_newer_writer(written: Event) -> Event:
    """The same event from a program of later versions: fields that today's readers do not know."""
    data = written["data"] | {"explanation": {"depth": [1, 2, 3]}, "x": None}
    return {**written, "data": data, "datacontenttype": "application/json", "traceflags": "00"}


def encoded(written: Event) -> bytes:
    """Its bytes."""
    return json.dumps(written, separators=(",", ":")).encode()


def _with_body(written: Event, **changes: Any) -> bytes:
    return encoded({**written, "data": {**written["data"], **changes}})


def _without(written: Event, field: str) -> bytes:
    return encoded({**written, "data": {k: v for k, v in written["data"].items() if k != field}})


ANY_TOPIC: dict[str, Callable[[Event], bytes | None]] = {
    "cut": lambda e: encoded(e)[:-20],
    "unknown-version": lambda e: encoded({**e, "type": e["type"].removesuffix("v1") + "v9"}),
    "nul": lambda e: encoded({**e, "subject": "a\0b"}),
    "no-utf8": lambda e: encoded(e).replace(b"/chaos", b"/ch\xff\xfes"),
    "no-value": lambda _e: None,
    "no-object": lambda _e: b"[1,2,3]",
    "not-a-number": lambda e: encoded(e)[:-2] + b',"x":NaN}}',
    "deep": lambda _e: b"[" * 5_000,
    "no-tenant": lambda e: encoded({k: v for k, v in e.items() if k != "tenantid"}),
}
"""Poison that no reader of any topic can decode."""
REQUESTS: dict[str, Callable[[Event], bytes | None]] = {
    **ANY_TOPIC,
    "no-rules": lambda e: _without(e, "rules"),
    "path": lambda e: _with_body(e, left={"source": "file", "path": "../other/x.csv", "format": "csv"}),
    "misplaced": lambda e: encoded(
        {**e, "type": "settler.usage.recorded.v1", "data": {"resource": "requests", "quantity": 1}}
    ),
    "beyond-64-bits": lambda e: _with_body(e, estimated_cost_us=2**70),
    "oversize": lambda e: _with_body(e, note="x" * OVERSIZE_BYTES),
}
"""Poison among the job requests."""
KEYS: dict[str, bytes | None] = {"key-no-utf8": b"\xff\xfe", "no-key": None}
"""Keys that cannot be a root tenant's."""


def poison(written: Event, chance: random.Random, *, request: bool) -> tuple[str, Bad]:
    """A bad form of ``written``, and its name."""
    kinds = REQUESTS if request else ANY_TOPIC
    name = chance.choice([*kinds, *KEYS])
    key = written["root"].encode()
    plain = {k: v for k, v in written.items() if k != "root"}
    if name in KEYS:
        return name, Bad(encoded(plain), KEYS[name])
    return name, Bad(kinds[name](plain), key)
