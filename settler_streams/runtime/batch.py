"""A batch: whatever has arrived for one fold, on its way from the consumer through Faust to the fold's agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from aiokafka.structs import TopicPartition

from settler_streams.runtime.state import Overlay
from settler_streams.runtime.step import Records
from settler_streams.runtime.turns import turn

ORDINARY_BYTES = 512
"""Of one record: a request that names its record sets, a decision, a result."""


class Ownership(Protocol):
    """One ownership of one fold or projection: opened once, closed once, lost after any failure."""

    positions: dict[TopicPartition, int]
    taken: bool
    """Nobody else can change anything under the former owner's name any more; what is left of opening fences nobody."""
    loaded: int
    """How far opening has come in reading the stored state, as an offset; 0 where there is none to read."""
    now_ms: int
    """The fold's clock, as it was committed; 0 where there is none."""
    state: Overlay
    """Empty where the rows in Postgres are the state."""
    logic: Any

    async def open(self) -> None:
        """Take over: fence the former owner, then read positions and state."""
        ...

    async def fetch(self, wait_s: float) -> Records:
        """The next records of its inputs; empty after ``wait_s`` seconds. What was handed out is not handed out again.

        Raises:
            UnavailableError: they cannot be read.
        """
        ...

    async def backlog(self) -> tuple[list[int], bool]:
        """The offsets that are read next, and whether the broker, asked now, holds records there.

        Raises:
            UnavailableError: the broker did not answer.
        """
        ...

    def new_step(self, records: Records) -> AbstractAsyncContextManager[Any]:
        """The transaction that processes ``records``."""
        ...

    async def close(self) -> None:
        """Give up. Bounded."""
        ...


class Batch:
    """Records of one fold's inputs, in order within each partition. An agent processes it in one step.

    At most one batch of a fold is under way, so batches of different folds may be processed side by side.
    """

    def __init__(self, session: Ownership, partition: int, records: Records) -> None:
        self._session = session
        self._records = records
        self.partition = partition
        self.started = False
        self.discarded = False
        self.in_step = False
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __len__(self) -> int:
        return sum(len(raws) for raws in self._records.values())

    @property
    def weight(self) -> int:
        """How many records of an ordinary size it is worth: one event may hold the jobs of a whole step."""
        values = (raw.value for raws in self._records.values() for raw in raws)
        return max(len(self), sum(len(value) for value in values if value) // ORDINARY_BYTES)

    @property
    def logic(self) -> Any:
        """The decisions of this batch's fold, over the state of its session."""
        return self._session.logic

    @property
    def state(self) -> Overlay:
        """The fold's state."""
        return self._session.state

    def discard(self) -> None:
        """The partitions are being taken away before the agent came to this batch; it will be read again."""
        self.discarded = True
        self._finish(None)

    @asynccontextmanager
    async def step(self) -> AsyncIterator[Any]:
        """Process the batch: one transaction, committed on leaving, aborted by any exception."""
        async with turn(0 if self.discarded else self.weight):
            if self.discarded:  # perhaps while it waited for its turn
                yield self._session.new_step({})  # not entered: it decodes nothing and sends nothing
                return
            self.started = True
            try:
                async with self._session.new_step(self._records) as step:
                    self.in_step = True
                    try:
                        yield step
                    finally:
                        self.in_step = False
            except BaseException as error:
                self._finish(error)
                raise
            self._finish(None)

    def _finish(self, error: BaseException | None) -> None:
        if self.finished.done():
            return
        if error is None:
            self.finished.set_result(None)
        else:
            self.finished.set_exception(error)
