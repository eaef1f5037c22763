"""A fold's state: committed values, the overlay of the step in progress, and their stored form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from settler_streams.core.fold import Value
from settler_streams.errors import StateError

_PACK = msgspec.msgpack.Encoder()


class StateCodec:
    """Encodes a fold's values as one format byte and MessagePack; reads the current format and the previous one."""

    def __init__(self, kinds: Mapping[str, type[Value]]) -> None:
        self._kinds = kinds
        self._decoders = {prefix: msgspec.msgpack.Decoder(kind) for prefix, kind in kinds.items()}

    def encode(self, value: Value) -> bytes:
        """The changelog record's value."""
        return bytes((value.FORMAT,)) + _PACK.encode(value)

    def decode(self, key: str, stored: bytes) -> Value:
        """Read a changelog record's value.

        Raises:
            StateError: the key's kind or the value's format is unknown, or the value does not decode. A bad value
                stops the worker: going on without it would decide from a wrong state.
        """
        prefix = key.partition("/")[0]
        kind = self._kinds.get(prefix)
        if kind is None:
            raise StateError(f"changelog key {key!r}: no state of the kind {prefix!r} is known to this version")
        try:
            if stored[0] == kind.FORMAT:
                return self._decoders[prefix].decode(memoryview(stored)[1:])
            if stored[0] == kind.FORMAT - 1:
                return kind.from_previous(stored[1:])
        except (msgspec.DecodeError, ValueError, IndexError) as error:
            raise StateError(f"changelog key {key!r}: stored value does not decode: {error}") from error
        raise StateError(f"changelog key {key!r}: stored format {stored[0]}, this version reads {kind.FORMAT}")


class Overlay(Mapping[str, Value]):
    """The committed values, seen through the changes of the step in progress.

    The step writes into the overlay only; :meth:`merge` after the commit makes the changes the committed values,
    :meth:`discard` after an abort forgets them. Each touched key appears once in :attr:`changes`: the changelog gets
    one coalesced record per key and step.
    """

    def __init__(self) -> None:
        self._committed: dict[str, Value] = {}
        self.changes: dict[str, Value | None] = {}

    def load(self, key: str, value: Value | None) -> None:
        """Take one record of the changelog while the session opens."""
        if value is None:
            self._committed.pop(key, None)
        else:
            self._committed[key] = value

    def apply(self, changes: Mapping[str, Value | None]) -> None:
        """Put the changes of one decision."""
        self.changes.update(changes)

    def merge(self) -> None:
        """The step's transaction is committed."""
        for key, value in self.changes.items():
            self.load(key, value)
        self.changes = {}

    def discard(self) -> None:
        """The step's transaction is aborted."""
        self.changes = {}

    def __getitem__(self, key: str) -> Value:
        if key in self.changes:
            value = self.changes[key]
            if value is None:
                raise KeyError(key)
            return value
        return self._committed[key]

    def get(self, key: str, default: Any = None) -> Any:
        """As for any mapping; written out, since the inherited one costs an exception for each absent key."""
        changes = self.changes
        if key in changes:
            value = changes[key]
            return default if value is None else value
        return self._committed.get(key, default)

    def __iter__(self) -> Iterator[str]:
        changes = self.changes
        for key in self._committed:
            if key not in changes:
                yield key
        for key, value in changes.items():
            if value is not None:
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)
