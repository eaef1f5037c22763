"""Which ids have been handled: a duplicate is the same (source, id) within a stated window.

The window is :data:`SEEN_WINDOW_MS`, or the last :data:`SEEN_MAX` ids of the partition if that is shorter.
"""

from __future__ import annotations

from collections import deque

from settler_streams.core.fold import Record, State, Value, value_of
from settler_streams.errors import RecordError
from settler_streams.ids import TenantId

SEEN_WINDOW_MS = 10 * 60_000
"""How long an id is remembered: a producer's retries end long before."""
SEEN_MAX = 200_000
"""Ids remembered per partition at most (measured: 73 MB); beyond it the oldest are forgotten first."""
PREFIX = "seen"


class Seen(Value, frozen=True, array_like=True):
    """An id that has been handled, and whose it was. ``number`` keeps the order of those of one millisecond."""

    source: str
    tenant: TenantId
    at_ms: int
    number: int


class SeenWindow:
    """The ids of one fold. Its values lie in the fold's state under ``seen/``; the order of age is kept here."""

    def __init__(self, state: State) -> None:
        self._state = state
        known = [(value.at_ms, value.number, key) for key, value in state.items() if isinstance(value, Seen)]
        self._by_age: deque[tuple[int, int, str]] = deque(sorted(known))

    def repeated(self, record: Record) -> bool:
        """Whether the record has been handled already.

        Raises:
            RecordError: ``id-conflict``; another source or tenant has used this id, so it is not the same event.
        """
        seen = value_of(self._state, f"{PREFIX}/{record.event.id}", Seen)
        if seen is None:
            return False
        event = record.event
        if (seen.source, seen.tenant) == (event.source, event.tenantid):
            return True
        raise RecordError(
            "id-conflict",
            f"{event.source!r} uses for {event.tenantid} the id {event.id}, used by {seen.source!r} for {seen.tenant}",
        )

    def remember(self, record: Record, now_ms: int) -> dict[str, Value | None]:
        """The changes that remember this record and forget those that fall out of the window.

        Call it when nothing can refuse the record any more: what is remembered here has to be stored.
        """
        key = f"{PREFIX}/{record.event.id}"
        number = self._by_age[-1][1] + 1 if self._by_age else 0
        self._by_age.append((now_ms, number, key))
        changes = self.forget(now_ms)
        changes[key] = Seen(record.event.source, record.event.tenantid, now_ms, number)
        return changes

    def forget(self, now_ms: int) -> dict[str, Value | None]:
        """The changes that forget the ids whose window has passed, or that the bound pushes out."""
        changes: dict[str, Value | None] = {}
        ages = self._by_age
        while ages and (ages[0][0] <= now_ms - SEEN_WINDOW_MS or len(ages) > SEEN_MAX):
            changes[ages.popleft()[2]] = None
        return changes
