"""The form of a dead letter: the raw bytes as they came, and headers that say where they came from and why.

Its key is its own, made of who refused what and when, and the record's key is a header: the topic is compacted besides
being cut off by age, so that a tombstone takes a dead letter out of it before its time, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from settler_streams.errors import RecordError

if TYPE_CHECKING:
    from aiokafka.structs import ConsumerRecord

REASON = "dl-reason"
DETAIL = "dl-detail"
ROLE = "dl-role"
TOPIC = "dl-topic"
PARTITION = "dl-partition"
OFFSET = "dl-offset"
ATTEMPTS = "dl-attempts"
AT_MS = "dl-at-ms"
KEY = "dl-key"
"""The record's own key; absent if it had none."""
REDRIVEN = "dl-redriven"
"""On a marker beside the dead letters, and on nothing else: the offset of the one that has been redriven."""
REDRIVEN_OFFSET = "redriven-offset"
"""On a record that has been redriven: the offset at which it lay first. It stays if the record is refused again."""
CUT = "dl-cut"
"""On a dead letter that holds the beginning of its record only: the bytes of the whole, which is where it came from."""
BYTES_MAX = 3 * 2**20
"""What a dead letter keeps. The broker weighs records compressed: written out, one may fit in no topic."""
CUT_KEY_BYTES_MAX = 1_024
"""What is kept of the key of a record that has to be cut; a root tenant's id has 36 bytes."""
DETAIL_BYTES_MAX = 2_000
"""A detail quotes the input; this much of it is enough to understand the failure."""
ATTEMPTS_MAX = 5
"""A record redriven this often and refused again is quarantined: it is not offered for bulk redrive."""

ATTEMPTS_DIGITS_MAX = 9
"""More digits than any honest count; a header is whatever a producer puts there."""
OFFSET_DIGITS_MAX = 19
"""Offsets have 63 bits."""

Headers = list[tuple[str, bytes]]


class Letter(NamedTuple):
    """A dead letter as it is sent; ``key`` is no other one's."""

    key: bytes
    value: bytes
    headers: Headers


def letter(raw: ConsumerRecord[Any, Any], role: str, error: RecordError, now_ms: int) -> Letter:
    """The dead letter of ``raw``: whole, or cut when it is larger than :data:`BYTES_MAX`."""
    size = size_of(raw)
    key = f"{role}/{raw.topic}/{raw.partition}/{raw.offset}/{now_ms}".encode()
    said = headers(raw, role, error, now_ms)
    if size <= BYTES_MAX:
        return Letter(key, raw.value or b"", said)
    about = [
        (name, value[:CUT_KEY_BYTES_MAX] if name == KEY else value) for name, value in said if name.startswith("dl-")
    ]
    return Letter(key, (raw.value or b"")[:BYTES_MAX], [*about, (CUT, str(size).encode())])


def size_of(raw: ConsumerRecord[Any, Any]) -> int:
    """The bytes of a record, written out."""
    noted = sum(len(name.encode()) + len(value or b"") for name, value in raw.headers or ())
    return len(raw.key or b"") + len(raw.value or b"") + noted


def headers(raw: ConsumerRecord[Any, Any], role: str, error: RecordError, now_ms: int) -> Headers:
    """Headers of the dead letter of ``raw``; the record's own headers (trace context) are kept in front of them."""
    own = [(name, value) for name, value in raw.headers or () if not name.startswith("dl-")]
    attempts = 1 + attempts_of(dict(raw.headers or ()))
    return [
        *own,
        (REASON, error.reason.encode()),
        (DETAIL, error.detail.encode(errors="replace")[:DETAIL_BYTES_MAX]),
        (ROLE, role.encode()),
        (TOPIC, raw.topic.encode()),
        (PARTITION, str(raw.partition).encode()),
        (OFFSET, str(raw.offset).encode()),
        (ATTEMPTS, str(attempts).encode()),
        (AT_MS, str(now_ms).encode()),
        *([] if raw.key is None else [(KEY, raw.key)]),
    ]


def attempts_of(headers: Mapping[str, bytes]) -> int:
    """How often the record has been refused before; anything but a plain count is nought."""
    text = headers.get(ATTEMPTS) or b""
    return int(text) if text.isdigit() and len(text) <= ATTEMPTS_DIGITS_MAX else 0


def first_offset(headers: Mapping[str, bytes], offset: int) -> int:
    """Where the record at ``offset`` lay before it was redriven, for the first time; ``offset`` if it was not.

    Anything but a plain count below ``offset`` is passed over. So whoever forges the header makes its record older than
    it is, never newer: it loses to rows that it would have replaced.
    """
    text = headers.get(REDRIVEN_OFFSET) or b""
    return min(int(text), offset) if text.isdigit() and len(text) <= OFFSET_DIGITS_MAX else offset
