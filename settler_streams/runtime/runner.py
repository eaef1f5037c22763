"""One fold at work: open its session, then fetch, hand over a batch, wait until its step has committed, again.

A fold never has two batches under way, so a batch grows with whatever has arrived meanwhile: an idle system answers in
milliseconds, a loaded one commits in large steps. Folds run side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog
from aiokafka.errors import NoOffsetForPartitionError
from aiokafka.structs import TopicPartition

from settler_streams.runtime.batch import Batch, Ownership
from settler_streams.runtime.step import Records

log = structlog.get_logger(__name__)

FETCH_WAIT_S = 1.0
"""Longest wait of one fetch; only an idle fold waits this long, and it then asks again."""


ASSIGNED_RETRY_S = 0.5
"""A heartbeat's worth: Kafka says in one round trip whether the assignment still holds."""


class Source(Protocol):
    """Where records come from: the consumer, seen from its own thread or not."""

    async def fetch(self, tps: frozenset[TopicPartition], wait_s: float) -> Records: ...

    async def seek(self, positions: Mapping[TopicPartition, int]) -> None: ...

    async def is_assigned(self, partition: int) -> bool: ...


class FoldRunner:
    """Drives one fold from assignment to revocation. ``deliver`` hands a batch to Faust."""

    def __init__(
        self, partition: int, session: Ownership, source: Source, deliver: Callable[[Batch], Awaitable[None]]
    ) -> None:
        self.partition = partition
        self.session = session
        self.opened = False
        self._source = source
        self._deliver = deliver
        self._flow = asyncio.Event()
        self._positioned = False
        self._batch: Batch | None = None
        self._resumed = 0
        self._batches = 0

    async def run(self) -> None:
        """Until cancelled, or until something fails, in which case the worker stops."""
        await self._until_assigned()
        await self.session.open()
        self.opened = True
        tps = frozenset(self.session.positions)
        while True:
            await self._flow.wait()
            if not self._positioned:
                # Said first: a rebalance during the seek takes it back, and the new assignment is positioned anew.
                self._positioned = True
                await self._source.seek(self.session.positions)
            try:
                records = await self._source.fetch(tps, FETCH_WAIT_S)
            except NoOffsetForPartitionError:
                # The consumer looked for a committed offset before the session's seek; the position stands now.
                continue
            if records and self._flow.is_set() and self._positioned:
                await self._process(records)

    async def _until_assigned(self) -> None:
        """An owner of yesterday that opened would fence today's. Wait to be dropped, or for Kafka's answer."""
        while True:
            if await self._source.is_assigned(self.partition):
                return
            await asyncio.sleep(ASSIGNED_RETRY_S)

    async def _process(self, records: Records) -> None:
        self._batches += 1
        batch = self._batch = Batch(self.session, self.partition, records)
        await self._deliver(batch)
        await batch.finished
        self._batch = None

    def resume(self) -> None:
        """Let records flow, from the session's own positions."""
        self._positioned = False
        self._resumed += 1
        self._flow.set()

    @property
    def busy(self) -> bool:
        """Whether something is under way that has to come to an end: opening, a rebalance, a batch."""
        return not self.opened or not self._flow.is_set() or self._batch is not None

    @property
    def standing(self) -> tuple[int, ...]:
        """Differs from any earlier one as soon as the fold has got anywhere."""
        return (self.opened, self._resumed, self._batches, *self.session.positions.values())

    async def pause(self) -> None:
        """Stop the flow; return when the step under way has ended. A batch that has not begun is given up."""
        self._flow.clear()
        self._positioned = False
        batch = self._batch
        if batch is None:
            return
        if not batch.started:
            batch.discard()
        await asyncio.wait([batch.finished])
