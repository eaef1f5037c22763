"""One fold at work: open its session, then fetch, hand over a batch, wait until its step has committed, again.

A fold never has two batches under way, so a batch grows with whatever has arrived meanwhile: an idle system answers in
milliseconds, a loaded one commits in large steps. Folds run side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from settler_streams.adapters.kafka.cluster import heed_cancellation
from settler_streams.runtime.batch import Batch, Ownership
from settler_streams.runtime.step import Records
from settler_streams.runtime.turns import LARGE_RECORDS
from settler_streams.runtime.watchdog import Standing

FETCH_WAIT_S = 1.0
"""Longest wait of one fetch; only an idle fold waits this long, and it then asks again."""
ASSIGNED_RETRY_S = 0.5
"""Kafka says in one round trip whether the assignment still holds; where it does not, a rebalance is on its way."""


class FoldRunner:
    """Drives one fold from assignment to revocation.

    Args:
        session: its ownership; opened here, closed by whoever drops the runner.
        is_assigned: asks Kafka whether the fold still belongs to this member.
        deliver: hands a batch to Faust.
        gather_s: how long a small batch waits for its step, so that the next one is larger.
    """

    def __init__(
        self,
        partition: int,
        session: Ownership,
        is_assigned: Callable[[int], Awaitable[bool]],
        deliver: Callable[[Batch], Awaitable[None]],
        gather_s: float = 0.0,
    ) -> None:
        self.partition = partition
        self.session = session
        self.opened = False
        self._is_assigned = is_assigned
        self._deliver = deliver
        self._gather_s = gather_s
        self._flow = asyncio.Event()
        self._fetched = False
        self._batch: Batch | None = None
        self._resumed = 0
        self._batches = 0

    async def run(self) -> None:
        """Until cancelled, or until something fails, in which case the worker stops."""
        await self._until_assigned()
        await self.session.open()
        heed_cancellation()  # opening closes clients; the flow of a fold that was dropped meanwhile never comes
        self.opened = True
        while True:
            await self._flow.wait()
            if records := await self.session.fetch(FETCH_WAIT_S):
                self._fetched = True
                if self._gather_s and sum(map(len, records.values())) < LARGE_RECORDS:
                    await asyncio.sleep(self._gather_s)
                await self._process(records)
                self._fetched = False

    async def _until_assigned(self) -> None:
        """An owner of yesterday that opened would fence today's. Wait to be dropped, or for Kafka's answer."""
        while True:
            if await self._is_assigned(self.partition):
                return
            await asyncio.sleep(ASSIGNED_RETRY_S)

    async def _process(self, records: Records) -> None:
        """Until they are processed: a rebalance may come before their agent has begun, and the fold may stay here."""
        while True:
            await self._flow.wait()
            self._batches += 1
            batch = self._batch = Batch(self.session, self.partition, records)
            await self._deliver(batch)
            await batch.finished
            self._batch = None
            if not batch.discarded:
                return

    def resume(self) -> None:
        """Let records flow."""
        self._resumed += 1
        self._flow.set()

    async def pause(self) -> None:
        """Stop the flow; return when the step under way has ended. A batch that has not begun is given up."""
        self._flow.clear()
        self.give_up()
        if self._batch is not None:
            await asyncio.wait([self._batch.finished])

    def give_up(self) -> None:
        """Of the batch at hand, if its step has not begun: it does not begin any more."""
        if self._batch is not None and not self._batch.started:
            self._batch.discard()

    async def standing(self) -> Standing:
        """Where the fold stands, and whether anything waits for it; asks the broker.

        Raises:
            UnavailableError: the broker did not answer.
        """
        at, behind = await self.session.backlog() if self.opened else ([], False)
        busy = not self.opened or not self._flow.is_set() or self._fetched
        session = self.session
        moved = (self.opened, session.loaded, self._resumed, self._batches, *session.positions.values(), *at)
        return Standing(moved, waits=busy or behind)
