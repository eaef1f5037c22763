"""The envelope: CloudEvents 1.0 in JSON, structured mode, with the tenant as the extension attribute ``tenantid``.

One decoder reads every event type in one pass: the ``type`` attribute is the tag of a union, so an unknown type or
version, a missing attribute and a wrong body are all found while decoding. Encoding is deterministic, so that a replay
gives equal bytes.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar, Union, cast

import msgspec

from settler_streams.errors import RecordError
from settler_streams.events import flags, jobs, log, tenants
from settler_streams.events.fields import Uuid
from settler_streams.events.structs import REGISTRY, Part, plain_pattern
from settler_streams.ids import TenantId

__all__ = [
    "CONTENT_TYPE",
    "Envelope",
    "decode",
    "encode",
    "envelope",
    "flags",
    "jobs",
    "log",
    "misfit_of",
    "tenants",
    "writer_of",
]

CONTENT_TYPE = "application/cloudevents+json; charset=UTF-8"
"""Value of the Kafka header ``content-type`` (CloudEvents Kafka protocol binding, section 3.3)."""

D = TypeVar("D", bound=Part)
D_co = TypeVar("D_co", bound=Part, covariant=True)

_UUID = str(plain_pattern(Uuid))
_is_uuid = re.compile(_UUID).match
_BACKSLASH = 0x5C
SOURCE_LENGTH_MAX = 200
SUBJECT_LENGTH_MAX = 200
_Source = Annotated[str, msgspec.Meta(min_length=1, max_length=SOURCE_LENGTH_MAX)]
_Subject = Annotated[str, msgspec.Meta(min_length=1, max_length=SUBJECT_LENGTH_MAX)]
_Time = Annotated[dt.datetime, msgspec.Meta(tz=True)]


class Envelope(msgspec.Struct, Generic[D_co], frozen=True, kw_only=True, gc=False):
    """One event. ``id`` is unique per ``source``; ``tenantid`` is whom it concerns; ``data`` is the event's body."""

    specversion: Literal["1.0"]
    id: str
    source: str
    time: dt.datetime
    tenantid: TenantId
    data: D_co
    subject: str | None = None

    @property
    def type(self) -> str:
        """The CloudEvents type, which ends in its version."""
        return self.data.event_type

    @property
    def time_ms(self) -> int:
        """The event's own time in milliseconds since the Unix epoch; a client's claim, never a fold's clock."""
        return (self.time - _EPOCH) // _MILLISECOND


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MILLISECOND = dt.timedelta(milliseconds=1)


def _envelope_struct(event_type: str, body: type[Part]) -> type[Envelope[Part]]:
    return cast(
        "type[Envelope[Part]]",
        msgspec.defstruct(
            f"{body.__name__}Envelope",
            [
                ("specversion", Literal["1.0"]),
                ("id", str),
                ("source", _Source),
                ("subject", _Subject | None, None),
                ("time", _Time),
                ("tenantid", str),
                ("datacontenttype", Literal["application/json"], "application/json"),
                ("data", body),
            ],
            bases=(Envelope,),
            tag_field="type",
            tag=event_type,
            frozen=True,
            kw_only=True,
            omit_defaults=True,
            gc=False,
        ),
    )


_ENVELOPES: dict[type[Part], type[Envelope[Part]]] = {
    body: _envelope_struct(event_type, body) for event_type, body in sorted(REGISTRY.items())
}
_BY_TYPE = {body.event_type: struct for body, struct in _ENVELOPES.items()}
_DECODER: msgspec.json.Decoder[Envelope[Part]] = msgspec.json.Decoder(Union[tuple(_ENVELOPES.values())])  # noqa: UP007
_ENCODER = msgspec.json.Encoder()


REMEMBERED_LENGTH_MAX = 128
"""Longer texts are looked at each time: what anyone may write must not fill the memory with texts of a megabyte."""


class _Pattern:
    """A pattern, and texts that are known to match it: tenants and kinds of jobs come again and again.

    Whoever is in a hurry looks into ``known`` first.
    """

    def __init__(self, pattern: str, known_max: int) -> None:
        self._match = re.compile(pattern).match
        self._known_max = known_max
        self.known: set[str] = set()

    def fits(self, text: str) -> bool:
        """Whether ``text`` matches."""
        if self._match(text) is None:
            return False
        if len(text) <= REMEMBERED_LENGTH_MAX and self._known_max:
            if len(self.known) >= self._known_max:
                self.known.clear()
            self.known.add(text)
        return True


_TENANT = _Pattern(_UUID, 65_536)


def _late_pattern(pattern: str) -> _Pattern:
    return _Pattern(pattern, 0 if pattern == _UUID else 1024)  # ids of users and jobs do not come again


_LATE: dict[type[Part], tuple[tuple[str, _Pattern], ...]] = {
    body: tuple((name, _late_pattern(pattern)) for name, pattern in body.late) for body in REGISTRY.values()
}
"""What the decoder itself does not check: it would call each pattern through Python, at a third of the whole time."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""No JSON, no UTF-8, or nested deeper than the decoder follows: whoever sends such a record must not stop a worker."""


def envelope(
    data: Part, event_id: str, source: str, tenant: TenantId, time: dt.datetime, subject: str | None = None
) -> Envelope[Part]:
    """Put ``data`` into its envelope; the type attribute follows from the body."""
    return _ENVELOPES[type(data)](
        specversion="1.0", id=event_id, source=source, time=time, tenantid=tenant, data=data, subject=subject
    )


def encode(event: Envelope[Part]) -> bytes:
    """The event as the bytes of a Kafka record's value."""
    return _ENCODER.encode(event)


Write: TypeAlias = Callable[[D, str, str, TenantId, dt.datetime, str | None], bytes]
"""Body, event id, source, tenant, time, subject; gives the bytes of a record's value."""


@cache
def writer_of(body: type[D]) -> Write[D]:
    """:func:`encode` and :func:`envelope` in one, for whoever writes many events of the type ``body``."""
    struct, encoded = _ENVELOPES[body], _ENCODER.encode

    def write(data: D, event_id: str, source: str, tenant: TenantId, time: dt.datetime, subject: str | None) -> bytes:
        return encoded(
            struct(
                specversion="1.0", id=event_id, source=source, time=time, tenantid=tenant, data=data, subject=subject
            )
        )

    return write


def decode(value: bytes | None) -> Envelope[Part]:
    """Read one record's value.

    Raises:
        RecordError: with the reason ``empty``, ``not-json`` (also what is nested too deeply, or is no UTF-8),
            ``nul-character``, ``unknown-type`` or ``schema``.
    """
    if not value:
        raise RecordError("empty", "the record has no value")
    if _BACKSLASH in value and b"u0000" in value and _has_nul(value):
        raise RecordError("nul-character", "a string contains U+0000, which PostgreSQL cannot store")
    try:
        event = _DECODER.decode(value)
    except msgspec.ValidationError as error:
        raise RecordError(*_explain(value, error)) from error
    except _UNREADABLE as error:
        raise RecordError("not-json", str(error)) from error
    if not _is_uuid(event.id):
        raise RecordError("schema", f"{event.id[:100]!r} is no UUID in canonical form - at `$.id`")
    if event.tenantid not in _TENANT.known and not _TENANT.fits(event.tenantid):
        raise RecordError("schema", f"{event.tenantid[:100]!r} is no UUID in canonical form - at `$.tenantid`")
    if (misfit := misfit_of(event.data)) is not None:
        raise RecordError("schema", f"{misfit} - at `$.data`")
    return event


def misfit_of(body: Part) -> str | None:
    """What is wrong with the patterns of a body that was decoded without an envelope: the decoder leaves them out."""
    for name, pattern in _LATE[type(body)]:
        text = getattr(body, name)
        if text is not None and text not in pattern.known and not pattern.fits(text):
            return f"{name}: {text[:100]!r} does not match the pattern"
    return None


def _has_nul(value: bytes) -> bool:
    """Whether a ``\\u0000`` in the text is an escape, that is, preceded by an even number of backslashes."""
    at = value.find(b"\\u0000")
    while at >= 0:
        before = at
        while before > 0 and value[before - 1] == _BACKSLASH:
            before -= 1
        if (at - before) % 2 == 0:
            return True
        at = value.find(b"\\u0000", at + 1)
    return False


def _explain(value: bytes, error: msgspec.ValidationError) -> tuple[str, str]:
    """Tell an unknown type or version from a body that breaks its schema."""
    try:
        head = msgspec.json.decode(value)
    except _UNREADABLE as unreadable:
        return "not-json", str(unreadable)
    event_type = head.get("type") if isinstance(head, dict) else None
    if isinstance(event_type, str) and event_type not in _BY_TYPE:
        return "unknown-type", f"no event type {event_type[:200]!r} is known here"
    return "schema", str(error)
