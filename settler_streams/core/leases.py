"""The roster of executors: whose lease runs, and which executor takes the next dispatch.

An executor holds its slots under one **incarnation**, an id that grows with each start (UUIDv7). Only the newest
incarnation counts: it ends the older one's lease at once, and what the older one says afterwards is fenced. Time is the
log's own, so each reader of the log ends the same lease at the same record.
"""

from __future__ import annotations

from contextlib import contextmanager
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from settler_streams.errors import ConflictError, InvalidRequestError
from settler_streams.ids import JobId

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COMPACTION_SLACK = 64
"""Dead entries that the heap may hold beyond twice its live ones before a rebuild, which so costs O(1) per push."""
SEEN_TICKS = 2
"""Ticks behind a placement after which it can be read by its executor.

A placement is published when its step commits, and the log goes on meanwhile: where the fold lags, or was without an
owner, heartbeats of long before that stand behind it. Ticks may do so, too, one of each owner; but none has appended
its next one before it had committed the last. So the second has to follow the one before it.
"""


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A job placed on an executor: when, or once there were :data:`SEEN_TICKS` after it, when the last of them was."""

    job_id: JobId
    since_ms: int
    ticks: int = 0


class ExecutorLease(msgspec.Struct, frozen=True, array_like=True):
    """One executor as persisted: its incarnation, slots, last sign of life, and the jobs placed on it.

    One that drains has no slots any more, while jobs of before may be placed on it.
    """

    executor: str
    incarnation: str
    slots: int
    renewed_ms: int
    held: tuple[Held, ...] = ()

    @property
    def free(self) -> int:
        """Slots without a job; never negative, even if an executor drains."""
        return max(0, self.slots - len(self.held))


class EndedLease(NamedTuple):
    """A lease that is over, and the jobs that have to return to the queue."""

    executor: str
    incarnation: str
    job_ids: tuple[JobId, ...]


class Placement(NamedTuple):
    """The executor that takes a job."""

    executor: str
    incarnation: str


class Heartbeat(NamedTuple):
    """What a heartbeat tells: whether it renewed a lease, and where the two sides disagree.

    ``foreign`` jobs run there although the roster has not placed them there (to be stopped). ``missing`` jobs could be
    read there for longer than the lease and are not run there (to be returned to the queue).
    """

    renewed: bool
    foreign: tuple[JobId, ...]
    missing: tuple[JobId, ...]


class Roster:
    """The executors of one pool. A mutable index that its fold owns; every operation is deterministic."""

    def __init__(self, leases: Iterable[ExecutorLease] = ()) -> None:
        """Empty, or rebuilt from the persisted values in any order."""
        self._leases: dict[str, ExecutorLease] = {}
        self._placed: dict[JobId, str] = {}
        self._heap: list[tuple[int, str]] = []  # (-free slots, executor); an entry is dead once the count has changed
        self._touched: dict[str, None] = {}
        for lease in leases:
            self._put(lease)
            self._placed.update((held.job_id, lease.executor) for held in lease.held)
        self._touched.clear()

    def joined(self, executor: str, incarnation: str, slots: int, now_ms: int) -> EndedLease | None:
        """Open a lease. Returns the older incarnation's, if that ends; a repeated or outdated join changes nothing.

        Raises:
            InvalidRequestError: ``slots`` is negative.
        """
        if slots < 0:
            raise InvalidRequestError(f"executor {executor} cannot have {slots} slots")
        lease = self._leases.get(executor)
        if lease is not None and incarnation <= lease.incarnation:
            return None
        ended = None if lease is None else self._end(lease)
        self._put(ExecutorLease(executor, incarnation, slots, now_ms))
        return ended

    def heartbeat(
        self, executor: str, incarnation: str, running: tuple[JobId, ...], now_ms: int, lease_ms: int
    ) -> Heartbeat:
        """Renew a lease. An incarnation without one has to join again (``renewed`` is False, its jobs are foreign)."""
        lease = self._leases.get(executor)
        if lease is None or lease.incarnation != incarnation:
            return Heartbeat(False, tuple(running), ())
        placed, runs = {held.job_id for held in lease.held}, set(running)
        foreign = tuple(job_id for job_id in running if job_id not in placed)
        missing = tuple(
            held.job_id
            for held in lease.held
            if held.job_id not in runs and held.ticks == SEEN_TICKS and now_ms - held.since_ms >= lease_ms
        )
        self._put(msgspec.structs.replace(lease, renewed_ms=max(now_ms, lease.renewed_ms)))
        return Heartbeat(True, foreign, missing)

    def draining(self, executor: str, incarnation: str, running: tuple[JobId, ...], now_ms: int) -> tuple[JobId, ...]:
        """Place nothing more on this incarnation, and renew its lease. Returns the jobs that it held and does not run.

        They are released here. Nothing changes if it has no lease.
        """
        lease = self._leases.get(executor)
        if lease is None or lease.incarnation != incarnation:
            return ()
        returned = tuple(held.job_id for held in lease.held if held.job_id not in set(running))
        self._put(msgspec.structs.replace(lease, slots=0, renewed_ms=max(now_ms, lease.renewed_ms)))
        for job_id in returned:
            self.released(job_id)
        return returned

    def left(self, executor: str, incarnation: str) -> EndedLease | None:
        """End the lease of an executor that says goodbye; None if another incarnation holds it."""
        lease = self._leases.get(executor)
        return None if lease is None or lease.incarnation != incarnation else self._end(lease)

    def expired(self, now_ms: int, lease_ms: int) -> tuple[EndedLease, ...]:
        """End every lease not renewed for ``lease_ms``, in the order of executor names. O(executors): once per tick."""
        overdue = [lease for lease in self._leases.values() if now_ms - lease.renewed_ms >= lease_ms]
        return tuple(self._end(lease) for lease in sorted(overdue, key=lambda lease: lease.executor))

    def ticked(self, now_ms: int, *, follows: bool) -> None:
        """Count a tick behind each placement, as far as ticks count. O(executors and what they hold): once per tick.

        ``follows``: it is the same ticker's next one after the tick before it.
        """
        for lease in self.leases():
            held = tuple(_with_tick(one, now_ms, follows=follows) for one in lease.held)
            if held != lease.held:
                self._put(msgspec.structs.replace(lease, held=held))

    @contextmanager
    def passing_over(self, executor: str) -> Iterator[None]:
        """Meanwhile this executor, which has a lease, has no free slot."""
        slots = self._leases[executor].slots
        self._put(msgspec.structs.replace(self._leases[executor], slots=0))
        yield
        self._put(msgspec.structs.replace(self._leases[executor], slots=slots))

    def place(self, job_id: JobId, now_ms: int) -> Placement | None:
        """Put a job on the executor with the most free slots, the first by name among equals. None: none is free.

        Raises:
            ConflictError: the job is placed already.
        """
        if job_id in self._placed:
            raise ConflictError(f"job {job_id} is already placed on executor {self._placed[job_id]}")
        while self._heap and not self._is_live(self._heap[0]):
            heappop(self._heap)
        if not self._heap:
            return None
        lease = self._leases[self._heap[0][1]]
        self._placed[job_id] = lease.executor
        self._put(msgspec.structs.replace(lease, held=(*lease.held, Held(job_id, now_ms))))
        return Placement(lease.executor, lease.incarnation)

    def released(self, job_id: JobId) -> bool:
        """Free the slot of a job that has ended. False: it holds none (its lease has ended, or it was released)."""
        executor = self._placed.pop(job_id, None)
        if executor is None:
            return False
        lease = self._leases[executor]
        held = tuple(one for one in lease.held if one.job_id != job_id)
        self._put(msgspec.structs.replace(lease, held=held))
        return True

    def free_slots(self) -> int:
        return sum(lease.free for lease in self._leases.values())

    def slots(self) -> int:
        """All slots under a lease, for the fair queue's ``set_slots``; those on which a drained executor still runs a
        job too, or that job would seem to take another executor's."""
        return sum(max(lease.slots, len(lease.held)) for lease in self._leases.values())

    def placement(self, job_id: JobId) -> Placement | None:
        """Where a job is placed."""
        executor = self._placed.get(job_id)
        return None if executor is None else Placement(executor, self._leases[executor].incarnation)

    def leases(self) -> tuple[ExecutorLease, ...]:
        return tuple(self._leases.values())

    def drain_changes(self) -> dict[str, ExecutorLease | None]:
        """The values to persist, one per executor touched since the last call; None is to be deleted."""
        changes = {executor: self._leases.get(executor) for executor in self._touched}
        self._touched = {}
        return changes

    def _end(self, lease: ExecutorLease) -> EndedLease:
        del self._leases[lease.executor]
        self._touched[lease.executor] = None
        for held in lease.held:
            del self._placed[held.job_id]
        return EndedLease(lease.executor, lease.incarnation, tuple(held.job_id for held in lease.held))

    def _put(self, lease: ExecutorLease) -> None:
        before = self._leases.get(lease.executor)
        self._leases[lease.executor] = lease
        self._touched[lease.executor] = None
        if lease.free and (before is None or before.free != lease.free):
            heappush(self._heap, (-lease.free, lease.executor))
        if len(self._heap) > 2 * len(self._leases) + COMPACTION_SLACK:
            self._heap = sorted(entry for entry in set(self._heap) if self._is_live(entry))

    def _is_live(self, entry: tuple[int, str]) -> bool:
        lease = self._leases.get(entry[1])
        return lease is not None and lease.free == -entry[0]


def _with_tick(held: Held, now_ms: int, *, follows: bool) -> Held:
    if held.ticks == SEEN_TICKS or (held.ticks > 0 and not follows):
        return held
    ticks = held.ticks + 1
    return Held(held.job_id, now_ms if ticks == SEEN_TICKS else held.since_ms, ticks)
