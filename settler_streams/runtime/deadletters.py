"""The form of a dead letter: the raw bytes as they came, and headers that say where they came from and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
DETAIL_BYTES_MAX = 2_000
"""A detail quotes the input; this much of it is enough to understand the failure."""
ATTEMPTS_MAX = 5
"""A record redriven this often and refused again is quarantined: it is not offered for bulk redrive."""

Headers = list[tuple[str, bytes]]


def headers(raw: ConsumerRecord[Any, Any], role: str, error: RecordError, now_ms: int) -> Headers:
    """Headers of the dead letter of ``raw``; the record's own headers (trace context) are kept in front of them."""
    own = [(name, value) for name, value in raw.headers or () if not name.startswith("dl-")]
    attempts = 1 + int(dict(raw.headers or ()).get(ATTEMPTS, b"0"))
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
    ]
