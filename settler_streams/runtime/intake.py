"""What a raw record has to be before a fold or a projection looks at it; anything else is a dead letter."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

from settler_streams.adapters.kafka.dead_letter_form import size_of
from settler_streams.errors import RecordError
from settler_streams.events import REGISTRY, Envelope, Part, decode

if TYPE_CHECKING:
    from aiokafka.structs import ConsumerRecord

    from settler_streams.topology import Topology

Raw: TypeAlias = "ConsumerRecord[Any, Any]"

TRACEPARENT = "traceparent"
TRACEPARENT_BYTES_MAX = 128
"""Version 00 of the header has 55 bytes. It is copied into state and onto every output, so it must not be of any size:
one of two megabytes would make outputs that no topic takes."""
_is_trace = re.compile(rb"[!-~]{1,%d}" % TRACEPARENT_BYTES_MAX).fullmatch
"""Visible ASCII, as every version of the header is: it travels within events too."""


class Intake:
    """Reads the records of one topology's topics."""

    def __init__(self, topology: Topology) -> None:
        self._types = {topic.name: frozenset(REGISTRY[name] for name in topic.events) for topic in topology.topics}
        self._bytes_max = {topic.name: topic.max_message_bytes for topic in topology.topics}

    def event_of(self, topic: str, raw: Raw) -> Envelope[Part]:
        """The event in a record of ``topic`` (the declared name).

        Raises:
            RecordError: ``oversize``; any reason of :func:`decode`; ``misplaced``, the topic does not carry this type:
                who may write into one topic must not be able to speak as the writer of another.
        """
        value = raw.value
        if value and len(value) > (limit := self._bytes_max[topic]):
            raise RecordError("oversize", f"the record has {len(value)} bytes, {topic} allows {limit}")
        event = decode(value)
        if type(event.data) not in self._types[topic]:
            raise RecordError("misplaced", f"{topic} does not carry {event.type}")
        return event

    def check_size(self, topic: str, raw: Raw) -> None:
        """Whether a record of ``topic`` can be sent on. The broker had weighed it compressed.

        Raises:
            RecordError: ``oversize``; written out, it is larger than the topic takes.
        """
        if (size := size_of(raw)) > (limit := self._bytes_max[topic]):
            raise RecordError("oversize", f"the record has {size} bytes, {topic} allows {limit}")


def traceparent_of(raw: Raw) -> bytes | None:
    """The record's trace context; what cannot be one is ignored."""
    for name, value in raw.headers or ():
        if name == TRACEPARENT and value is not None and _is_trace(value):
            return bytes(value)
    return None
