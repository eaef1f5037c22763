"""The in-memory log of one partition: offsets, markers, the last stable offset, compaction and retention."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from aiokafka.errors import OffsetOutOfRangeError
from aiokafka.structs import ConsumerRecord, TopicPartition

Headers = tuple[tuple[str, bytes], ...]
READ_COMMITTED = "read_committed"


@dataclass(eq=False, slots=True)
class Transaction:
    """One transaction of one producer. ``committed`` is None until it is decided."""

    transactional_id: str
    epoch: int
    committed: bool | None = None
    partitions: dict[TopicPartition, bool] = field(default_factory=dict)
    """Where it has written, or may have; True once its marker stands there."""
    offsets: dict[tuple[str, TopicPartition], int] = field(default_factory=dict)


@dataclass(slots=True)
class Entry:
    """One offset: a record, or (without one) a transaction's marker."""

    offset: int
    record: ConsumerRecord[Any, Any] | None
    transaction: Transaction | None


_offset_of = attrgetter("offset")


class Partition:
    """Entries in offset order. ``history`` keeps what compaction and retention take away, for whoever checks later."""

    def __init__(self, tp: TopicPartition) -> None:
        self.tp = tp
        self.start = 0
        self.end = 0
        self.history: list[Entry] = []
        self._entries: list[Entry] = []
        self._open: dict[Transaction, int] = {}
        self.hidden_from: int | None = None
        """A broker that was frozen shows what lies from here on only when something is appended."""

    @property
    def stable_end(self) -> int:
        """Kafka's last stable offset: nothing before it is undecided."""
        stable = min(self._open.values(), default=self.end)
        return stable if self.hidden_from is None else min(stable, self.hidden_from)

    def end_for(self, isolation: str) -> int:
        """The end as a consumer of this isolation level is told it."""
        return self.stable_end if isolation == READ_COMMITTED else self.end

    def append(
        self, now_ms: int, key: bytes | None, value: bytes | None, headers: Headers, by: Transaction | None
    ) -> int:
        """Write one record; returns its offset."""
        sizes = len(key or b""), len(value or b"")
        record = ConsumerRecord(
            self.tp.topic, self.tp.partition, self.end, now_ms, 1, key, value, None, *sizes, headers
        )
        if by is not None:
            self._open.setdefault(by, self.end)
        return self._add(Entry(self.end, record, by))

    def seal(self, transaction: Transaction) -> None:
        """Write the transaction's marker: what it has written here is decided."""
        self._open.pop(transaction, None)
        self._add(Entry(self.end, None, transaction))

    def _add(self, entry: Entry) -> int:
        self.hidden_from = None
        self._entries.append(entry)
        self.history.append(entry)
        self.end += 1
        return entry.offset

    def read(self, position: int, isolation: str, records_max: int) -> tuple[list[ConsumerRecord[Any, Any]], int]:
        """Records from ``position`` on, and the position after them.

        Raises:
            OffsetOutOfRangeError: the position lies outside the log.
        """
        if not self.start <= position <= self.end:
            raise OffsetOutOfRangeError({self.tp: position})
        end = self.end_for(isolation)
        found: list[ConsumerRecord[Any, Any]] = []
        for entry in self._entries[bisect_left(self._entries, position, key=_offset_of) :]:
            if entry.offset >= end or len(found) == records_max:
                return found, max(position, min(entry.offset, end))
            if entry.record is not None and (isolation != READ_COMMITTED or _visible(entry)):
                found.append(entry.record)
        return found, max(position, end)

    def has_records(self, position: int) -> bool:
        """Whether a consumer at ``position`` has something committed to read."""
        return position < self.stable_end and bool(self.read(position, READ_COMMITTED, 1)[0])

    def committed_entries(self) -> list[Entry]:
        """Every record that was ever committed, whatever has been cleaned away since."""
        end = self.stable_end
        return [e for e in self.history if e.offset < end and e.record is not None and _visible(e)]

    def compact(self, *, tombstones_stay: bool = False) -> None:
        """Keep the newest committed record of each key; a tombstone that is the newest goes too, unless told not to."""
        newest: dict[bytes | None, int] = {}
        for entry in self.committed_entries():
            assert entry.record is not None
            newest[entry.record.key] = entry.offset
        stable = self.stable_end
        self._entries = [e for e in self._entries if e.offset >= stable or _survives(e, newest, tombstones_stay)]

    def delete_before(self, offset: int) -> None:
        """Retention: the log begins at ``offset`` from now on."""
        self.start = max(self.start, min(offset, self.stable_end))
        self._entries = self._entries[bisect_left(self._entries, self.start, key=_offset_of) :]


def _visible(entry: Entry) -> bool:
    return entry.transaction is None or entry.transaction.committed is True


def _survives(entry: Entry, newest: dict[bytes | None, int], tombstones_stay: bool) -> bool:
    record = entry.record
    if record is None or newest.get(record.key) != entry.offset:
        return False
    return tombstones_stay or record.value is not None
