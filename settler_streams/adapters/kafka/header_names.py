"""Header names that are no UTF-8: read with escapes instead of failing at them.

The protocol wants UTF-8 there and no broker looks, so whoever may write into a topic can write any bytes. aiokafka
fails at such a record each time it is read: nothing behind it would ever be. Here the name reads ``\\xff`` for each
byte that is none; whoever looks for a header by its name passes over it.

There is no option for it. The one place where aiokafka makes a reader of what it has fetched gets this one
(:func:`install`). It costs a call a record, and a batch with such a name is read a second time, by aiokafka's decoder
that is written in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, SupportsIndex, cast

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import (
    DefaultRecordBatch,
    _DefaultRecordBatchPy,  # the only decoder whose steps can be taken one by one
)
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy


def install() -> None:
    """For every consumer of this process, from its next fetch on."""
    fetcher.MemoryRecords = ForgivingRecords


class ForgivingRecords:
    """The record batches of one partition in a fetched response, as :class:`aiokafka.record.MemoryRecords`."""

    def __init__(self, fetched: bytes) -> None:
        self._fetched = fetched
        self._records = MemoryRecords(fetched)
        self._read = 0
        self.has_next = self._records.has_next
        self.size_in_bytes = self._records.size_in_bytes

    def next_batch(self) -> Any:
        """The next batch; one of a format before headers as it is."""
        batch = self._records.next_batch()
        self._read += 1
        return _Batch(batch, self._fetched, self._read) if isinstance(batch, DefaultRecordBatch) else batch


class _Batch:
    """A batch, and where it can be read again."""

    def __init__(self, batch: Any, fetched: bytes, number: int) -> None:
        self._batch = batch
        self._fetched = fetched
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._batch
        except (UnicodeDecodeError, CorruptRecordException) as error:
            # The decoder that is written in Python wraps the one in the other.
            if not isinstance(error, UnicodeDecodeError) and not isinstance(error.__cause__, UnicodeDecodeError):
                raise
            # From the beginning: aiokafka passes over records that it has had.
            yield from _read_with_escapes(self._fetched, self._number)


def _read_with_escapes(fetched: bytes, number: int) -> Iterator[Any]:
    batches = _MemoryRecordsPy(fetched)
    for _ in range(number - 1):
        batches.next_batch()
    whole = batches._next_slice  # noqa: SLF001 - before a decoder is made of it
    batch = _DefaultRecordBatchPy(cast("memoryview", whole))
    batch._maybe_uncompress()  # noqa: SLF001
    batch._buffer = _Escaping(batch._buffer)  # noqa: SLF001
    return iter(batch)


class _Escaping(bytearray):
    """Bytes whose parts, as text, show what is no UTF-8."""

    def __getitem__(self, at: SupportsIndex | slice) -> Any:
        found = super().__getitem__(at)
        return _Escaping(found) if isinstance(found, bytearray) else found

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)
