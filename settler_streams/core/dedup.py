"""Which ids have been handled: a duplicate is the same (source, id) within a stated window.

The window is :data:`SEEN_WINDOW_MS`, or the last :data:`SEEN_MAX` ids of the partition if that is shorter.

In memory each id is known by itself. Stored are the ids of a step together, under ``seen/<number of the first>``: one
record a step instead of two an id, one when it comes and one when it is forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from settler_streams.core.fold import Record, State, Value
from settler_streams.errors import RecordError
from settler_streams.ids import PLATFORM, TenantId

SEEN_WINDOW_MS = 10 * 60_000
"""How long an id is remembered: a producer's retries end long before."""
SEEN_MAX = 200_000
"""Ids remembered per partition at most; beyond it the oldest are forgotten first."""
CHUNK_IDS_MAX = 2_000
"""Ids stored together at most: with the longest of sources, all different, they still fit a quarter of a record."""
PREFIX = "seen"
_DIGITS = 16

Owner = tuple[str, TenantId]
"""A source, and the tenant that it spoke for."""

NOBODY: Owner = ("", PLATFORM)
"""Whose the ids of an erased tenant are."""


Entry = tuple[str, int, int]
"""An id, the place of its owner in its chunk, and when it was handled."""


class SeenIds(Value, frozen=True, array_like=True):
    """Ids that were handled one after another, numbered from ``number`` on.

    ``owners`` holds each (source, tenant) once.
    """

    number: int
    owners: tuple[Owner, ...]
    entries: tuple[Entry, ...]


class SeenWindow:
    """The ids of one fold, in the order of their age."""

    def __init__(self, state: State) -> None:
        self._owner_of: dict[str, Owner] = {}
        self._by_age: deque[Entry] = deque()
        self._chunks: deque[tuple[str, int]] = deque()
        """The stored chunks: key, and the number of the id after its last."""
        self._next = 0
        """The number of the first fresh id."""
        self._fresh: list[Entry] = []
        self._places: dict[Owner, tuple[int, Owner]] = {}
        """Of the owners of the fresh ids, in their order; an owner is kept once, not once an id."""
        self._changes: dict[str, Value | None] = {}
        for chunk in sorted((v for v in state.values() if isinstance(v, SeenIds)), key=lambda chunk: chunk.number):
            self._load(chunk)

    def _load(self, chunk: SeenIds) -> None:
        for entry in chunk.entries:
            self.forget(entry[2])  # as it was then: an id that was forgotten may have come again
            self._add(entry, chunk.owners[entry[1]])
        self._next = chunk.number + len(chunk.entries)
        self._chunks.append((_key(chunk.number), self._next))

    def repeated(self, record: Record, now_ms: int) -> bool:
        """Whether the record has been handled already.

        Raises:
            RecordError: ``id-conflict``; another source or tenant has used this id, so it is not the same event.
        """
        self.forget(now_ms)
        event = record.event
        owner = self._owner_of.get(event.id)
        if owner is None:
            return False
        if owner == (event.source, event.tenantid):
            return True
        raise RecordError(
            "id-conflict",
            f"{event.source!r} uses for {event.tenantid} the id {event.id}, used by {owner[0]!r} for {owner[1]}",
        )

    def take(self, record: Record, now_ms: int) -> bool:
        """Remember the record if it is new, which is the answer; for records that nothing can refuse any more.

        Raises:
            RecordError: as :meth:`repeated`.
        """
        if record.event.id in self._owner_of and self.repeated(record, now_ms):
            return False
        self.remember(record, now_ms)
        return True

    def remember(self, record: Record, now_ms: int) -> None:
        """Remember a record that :meth:`repeated` has just called new. Call it when nothing can refuse it any more."""
        event = record.event
        owner = (event.source, event.tenantid)
        known = self._places.get(owner)
        if known is None:
            known = self._places[owner] = len(self._places), owner
        entry = (event.id, known[0], now_ms)
        self._add(entry, known[1])
        self._fresh.append(entry)
        if len(self._fresh) >= CHUNK_IDS_MAX:
            self._close_chunk()

    def forget(self, now_ms: int) -> None:
        """Forget the ids whose window has passed."""
        ages = self._by_age
        horizon_ms = now_ms - SEEN_WINDOW_MS
        while ages and ages[0][2] <= horizon_ms:
            del self._owner_of[ages.popleft()[0]]

    def disown(self, tenant: TenantId, state: State) -> None:
        """Keep the ids of ``tenant`` until their window has passed, and no longer whose they were."""
        if self._fresh:
            self._close_chunk()
        for key, _ in self._chunks:
            chunk = self._changes.get(key) or state.get(key)
            if isinstance(chunk, SeenIds) and any(owner[1] == tenant for owner in chunk.owners):
                owners = tuple(NOBODY if owner[1] == tenant else owner for owner in chunk.owners)
                self._changes[key] = msgspec.structs.replace(chunk, owners=owners)
        for event_id, owner in self._owner_of.items():
            if owner[1] == tenant:
                self._owner_of[event_id] = NOBODY

    def settle(self) -> dict[str, Value | None]:
        """The changes that store what was remembered, and delete what is wholly forgotten."""
        if self._fresh:
            self._close_chunk()
        changes, self._changes = self._changes, {}
        oldest = self._next - len(self._by_age)
        while self._chunks and self._chunks[0][1] <= oldest:
            changes[self._chunks.popleft()[0]] = None
        if not self._chunks:
            self._next = 0  # as a new owner would begin, to whom nothing is known
        return changes

    def _close_chunk(self) -> None:
        chunk = SeenIds(self._next, tuple(self._places), tuple(self._fresh))
        self._next += len(self._fresh)
        self._fresh.clear()
        self._places.clear()
        key = _key(chunk.number)
        self._changes[key] = chunk
        self._chunks.append((key, self._next))

    def __iter__(self) -> Iterator[str]:
        """The ids, oldest first."""
        return (event_id for event_id, _, _ in self._by_age)

    def _add(self, entry: Entry, owner: Owner) -> None:
        ages = self._by_age
        self._owner_of[entry[0]] = owner
        ages.append(entry)
        if len(ages) > SEEN_MAX:
            del self._owner_of[ages.popleft()[0]]


def _key(number: int) -> str:
    return f"{PREFIX}/{number:0{_DIGITS}}"
