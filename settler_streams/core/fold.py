"""What a fold is to the core: records in, an outcome out, over a state of keyed values.

A fold's logic is a class with ``decide``. It reads its state through a mapping, keeps whatever index it needs in
memory, and answers every record with an :class:`Outcome`. It must check before it changes its own index: when it
raises :class:`~settler_streams.errors.RecordError` the record becomes a dead letter and nothing else may have happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, TypeVar

import msgspec

from settler_streams.events import Envelope, Part
from settler_streams.ids import TenantId


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of every stored state value. ``FORMAT`` starts each stored value; one older format is still read."""

    FORMAT: ClassVar[int] = 1

    @classmethod
    def from_previous(cls, _payload: bytes) -> Value:
        """Read a value of format ``FORMAT - 1``."""
        raise ValueError(f"{cls.__name__} has no format before {cls.FORMAT}")


class FoldClock(Value, frozen=True, array_like=True):
    """Where the fold stands: its ``now`` and its positions, stored with every step.

    ``now_ms`` is the greatest LogAppendTime the fold has seen; it never goes back, not even across a restart.
    ``positions`` holds the next offset of each input, by declared name. Kafka's committed offsets say the same, but the
    broker forgets those of a group that was away for a week, and a fold that began anew would decide everything twice.
    ``topic_ids`` says which topics of these names are meant: in one that was deleted and made again they mean nothing.
    """

    now_ms: int
    positions: dict[str, int] = msgspec.field(default_factory=dict)
    topic_ids: dict[str, str] = msgspec.field(default_factory=dict)


CLOCK_KEY = "clock/"
"""Every fold stores where it stands under this key."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One decoded input: the event and where it stood. ``topic`` is the declared name, without prefix.

    ``traceparent`` is the W3C trace context of the record's headers; whatever the record leads to carries it on.
    """

    topic: str
    partition: int
    offset: int
    key: str
    event: Envelope[Part]
    traceparent: bytes | None = None


NO_TRACE = b""
"""Of an event that belongs to no trace, whatever its input belongs to."""


class Emit(msgspec.Struct, frozen=True, gc=False):
    """One event to publish. ``key`` is the root tenant (or state key); ``partition`` is given where the topic wants it.

    The id is derived from the input's id and ``suffix``: the same input always yields the same outputs. ``traceparent``
    is that of the input unless another one is given, or :data:`NO_TRACE`.
    """

    topic: str
    data: Part
    tenant: TenantId
    key: str
    suffix: str
    subject: str | None = None
    partition: int | None = None
    event_id: str | None = None
    traceparent: bytes | None = None


class Tombstone(msgspec.Struct, frozen=True, gc=False):
    """Deletes what a compacted topic holds under ``key`` in ``partition``."""

    topic: str
    key: str
    partition: int


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What one record led to: state values to put (``None`` deletes) and events to publish, in order.

    ``tombstones`` come behind the events.
    """

    changes: Mapping[str, Value | None] = msgspec.field(default_factory=dict)
    emits: tuple[Emit, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()


NOTHING = Outcome()
"""The record was seen and changes nothing."""

State = Mapping[str, Value]
"""A fold's state: keys are ``<kind>/<id>``; what a step has put is visible at once, and stored when it commits."""

V = TypeVar("V", bound=Value)


def value_of(state: State, key: str, kind: type[V]) -> V | None:
    """The value under ``key``, checked to be of ``kind``."""
    value = state.get(key)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"state key {key!r} holds {type(value).__name__}, expected {kind.__name__}")
    return value


class FoldLogic(Protocol):
    """The decisions of one role. One instance per fold and session, built from the state that the session loaded."""

    kinds: ClassVar[Mapping[str, type[Value]]]
    """The value type of each key prefix, up to and without the slash."""

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Decide on one record at ``now_ms``, the fold's clock including this record.

        Raises:
            RecordError: the record can never be decided; nothing was changed.
        """
        ...

    def settle(self) -> Outcome:
        """What the records of a step have led to together. Called once, after the last of them; the events have ids of
        their own, as no single record is their cause.
        """
        return NOTHING
