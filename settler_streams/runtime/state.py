"""A fold's state: committed values, the overlay of the step in progress, and their stored form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

import msgspec

from settler_streams.core.fold import Value
from settler_streams.errors import StateError
from settler_streams.runtime.intake import Raw

_PACK = msgspec.msgpack.Encoder()


class StateCodec:
    """Encodes a fold's values as one format byte and MessagePack; reads the current format and the previous one."""

    def __init__(self, kinds: Mapping[str, type[Value]]) -> None:
        self._kinds = kinds
        self._decoders = {prefix: msgspec.msgpack.Decoder(kind) for prefix, kind in kinds.items()}
        self._formats = {kind: bytes((kind.FORMAT,)) for kind in kinds.values()}
        self._present = {prefix: (kind.FORMAT, self._decoders[prefix].decode) for prefix, kind in kinds.items()}

    def encode(self, value: Value) -> bytes:
        """The changelog record's value."""
        return self._formats[type(value)] + _PACK.encode(value)

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
                return self._decoders[prefix].decode(stored[1:])
            if stored[0] == kind.FORMAT - 1:
                return kind.from_previous(stored[1:])
        except (msgspec.DecodeError, ValueError, IndexError) as error:
            raise StateError(f"changelog key {key!r}: stored value does not decode: {error}") from error
        raise StateError(f"changelog key {key!r}: stored format {stored[0]}, this version reads {kind.FORMAT}")

    def load(self, records: Iterable[Raw], values: dict[str, Value]) -> None:
        """Put the records of a changelog into ``values``, in order. Written for speed: a million keys are no rarity.

        Raises:
            StateError: as :meth:`decode`; or a key is not text.
        """
        present = self._present
        for record in records:
            try:
                key = record.key.decode()
            except (AttributeError, UnicodeDecodeError) as error:
                where = f"{record.topic}-{record.partition}@{record.offset}"
                raise StateError(f"changelog record {where}: {record.key!r} is no state key") from error
            stored = record.value
            if stored is None:
                values.pop(key, None)
                continue
            known = present.get(key[: key.find("/")])
            if known is not None and stored and stored[0] == known[0]:
                try:
                    values[key] = known[1](stored[1:])
                except (msgspec.DecodeError, ValueError) as error:
                    raise StateError(f"changelog key {key!r}: stored value does not decode: {error}") from error
            else:
                values[key] = self.decode(key, stored)


class Overlay(MutableMapping[str, Value]):
    """One fold's values, as the step in progress sees them.

    A step writes here; :meth:`merge` after the commit makes its changes the committed values, :meth:`discard` after an
    abort takes them back. What a touched key held before is kept meanwhile, so that a read costs no more than one of a
    dictionary. Each touched key appears once in :attr:`changes`: the changelog gets one record per key and step.
    """

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._before: dict[str, Value | None] = {}
        # The decisions read through `get`, a dozen times per record: the dictionary's own, not a method around it.
        self.get = self._values.get  # type: ignore[method-assign]

    def load(self, key: str, value: Value | None) -> None:
        """Take one record of the changelog while the session opens."""
        if value is None:
            self._values.pop(key, None)
        else:
            self._values[key] = value

    def load_changelog(self, codec: StateCodec, records: Iterable[Raw]) -> None:
        """Take many records of the changelog.

        Raises:
            StateError: one of them cannot be read.
        """
        codec.load(records, self._values)

    def apply(self, changes: Mapping[str, Value | None]) -> None:
        """Put the changes of one decision; ``None`` deletes."""
        values, before = self._values, self._before
        for key, value in changes.items():
            if key not in before:
                before[key] = values.get(key)
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value

    @property
    def changes(self) -> dict[str, Value | None]:
        """What the step has put so far, each touched key once; ``None`` where it was deleted."""
        return {key: self._values.get(key) for key in self._before}

    @property
    def committed(self) -> Mapping[str, Value]:
        """The values without the step in progress."""
        return Committed(self._values, self._before)

    def merge(self) -> None:
        """The step's transaction is committed."""
        self._before.clear()

    def discard(self) -> None:
        """The step's transaction is aborted."""
        for key, value in self._before.items():
            self.load(key, value)
        self._before.clear()

    def __getitem__(self, key: str) -> Value:
        return self._values[key]

    def __setitem__(self, key: str, value: Value) -> None:
        self.apply({key: value})

    def __delitem__(self, key: str) -> None:
        if key not in self._values:
            raise KeyError(key)
        self.apply({key: None})

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Committed(Mapping[str, Value]):
    """A fold's values seen past the step in progress."""

    def __init__(self, values: Mapping[str, Value], before: Mapping[str, Value | None]) -> None:
        self._values = values
        self._before = before

    def __getitem__(self, key: str) -> Value:
        value = self._before[key] if key in self._before else self._values.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._values if key not in self._before)
        yield from (key for key, value in self._before.items() if value is not None)

    def __len__(self) -> int:
        untouched = len(self._values) - sum(key in self._values for key in self._before)
        return untouched + sum(value is not None for value in self._before.values())
