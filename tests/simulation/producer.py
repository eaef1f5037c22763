"""aiokafka's producer over the simulated broker: what it promises, and what it is known to get wrong.

``commit_transaction`` waits for the sends and does not mind that one of them has failed; a commit that nobody waits for
any more goes on; and a producer that has been fenced takes no further call.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from aiokafka.errors import (
    ConcurrentTransactions,
    IllegalOperation,
    InvalidProducerEpoch,
    InvalidTxnState,
    ProducerClosed,
    ProducerFenced,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from tests.simulation.broker import RECORD_OVERHEAD_BYTES, Message
from tests.simulation.network import FOREVER_S
from tests.simulation.virtual_time import elapse

if TYPE_CHECKING:
    from tests.simulation.clients import SimulatedCluster

T = TypeVar("T")


class State(enum.Enum):
    """A producer's state, by aiokafka's names."""

    READY = "ready"
    IN_TRANSACTION = "in transaction"
    ENDING = "ending"
    FATAL = "fatal error"


class Builder:
    """What lies under a batch: it takes records of bytes, up to the producer's batch size."""

    def __init__(self, messages: list[Message], bytes_max: int) -> None:
        self._messages = messages
        self.bytes_left = bytes_max

    def append(
        self,
        _offset: int,
        _timestamp: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Iterable[tuple[str, bytes]],
    ) -> object | None:
        """Take a record; None if it does not fit any more."""
        size = len(key or b"") + len(value or b"") + RECORD_OVERHEAD_BYTES
        if size > self.bytes_left:
            return None
        self.bytes_left -= size
        self._messages.append((key, value, tuple(headers)))
        return self._messages


class Batch:
    """Records of one partition. As with aiokafka's, ``_relative_offset`` is how many there are."""

    def __init__(self, bytes_max: int) -> None:
        self.messages: list[Message] = []
        self._builder = Builder(self.messages, bytes_max)
        self._relative_offset = 0

    def append(
        self,
        *,
        timestamp: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Iterable[tuple[str, bytes]] = (),
    ) -> object | None:
        """Take a record; None if it does not fit any more."""
        taken = self._builder.append(self._relative_offset, timestamp, key, value, headers)
        self._relative_offset += taken is not None
        return taken

    def close(self) -> None:
        """Nothing is appended after this."""
        self._builder.bytes_left = 0


class Stored(NamedTuple):
    """Where the first record of a batch lies."""

    offset: int


class Producer:
    """As ``AIOKafkaProducer`` with a transactional id."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        *,
        transactional_id: str,
        transaction_timeout_ms: int = 60_000,
        max_batch_size: int = 16_384,
        **_options: Any,
    ) -> None:
        self._cluster = cluster
        self._broker = cluster.broker
        self._id = transactional_id
        self._timeout_s = transaction_timeout_ms / 1000
        self._batch_bytes = max_batch_size
        self._epoch = -1
        self._state = State.READY
        self._closed = False
        self._added: set[TopicPartition] = set()
        self._has_offsets = False
        self._sending: list[asyncio.Future[Any]] = []
        self._last_send: dict[TopicPartition, asyncio.Future[Any]] = {}
        self._ending: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Take the transactional id over."""
        self._epoch = await self._cluster.request("init", lambda: self._broker.init_producer(self._id, self._timeout_s))

    async def begin_transaction(self) -> None:
        """Begin; the broker hears of it with the first send."""
        assert self._state is State.READY, f"Invalid state transition {self._state} -> IN_TRANSACTION"
        self._state = State.IN_TRANSACTION
        self._added, self._has_offsets = set(), False
        self._sending, self._last_send = [], {}

    def create_batch(self) -> Batch:
        """An empty batch."""
        return Batch(self._batch_bytes)

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        """Hand a batch over; the returned future has the broker's answer."""
        if self._state is not State.IN_TRANSACTION:
            raise IllegalOperation("Can't send messages while not in transaction")
        if self._closed:
            raise ProducerClosed
        tp = TopicPartition(topic, partition)
        answer = self._cluster.process.spawn(self._produce(tp, batch, self._last_send.get(tp)))
        self._last_send[tp] = answer
        self._sending.append(answer)
        return answer

    async def _produce(self, tp: TopicPartition, batch: Batch, previous: asyncio.Future[Any] | None) -> Stored:
        if previous is not None:
            await asyncio.wait([previous])
        if self._state is State.FATAL:
            raise ProducerFenced

        def effect() -> int:
            if tp not in self._added:
                self._checked(lambda: self._broker.add_partition(self._id, self._epoch, tp, self._timeout_s))
                self._added.add(tp)
            return self._broker.produce(self._id, self._epoch, tp, batch.messages)

        try:
            return Stored(await self._cluster.request("produce", effect))
        except InvalidProducerEpoch as error:
            raise ProducerFenced from error

    async def send_offsets_to_transaction(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], group_id: str
    ) -> None:
        """Commit offsets of a group with the transaction."""
        if self._state is not State.IN_TRANSACTION:
            raise IllegalOperation("Not in the middle of a transaction")
        await self._open()
        plain = {tp: offset.offset for tp, offset in offsets.items()}
        self._has_offsets = True
        await asyncio.shield(
            self._cluster.process.spawn(
                self._cluster.request(
                    "offsets",
                    lambda: self._checked(
                        lambda: self._broker.add_offsets(self._id, self._epoch, group_id, plain, self._timeout_s)
                    ),
                )
            )
        )

    async def commit_transaction(self) -> None:
        """Wait for every send, whatever became of it, and commit."""
        await self._end(committed=True)

    async def abort_transaction(self) -> None:
        """Abort."""
        await self._end(committed=False)

    async def _end(self, *, committed: bool) -> None:
        assert self._state is State.IN_TRANSACTION, f"Invalid state transition {self._state} -> ENDING"
        self._state = State.ENDING
        self._ending = self._cluster.process.spawn(self._finish(committed=committed))
        await asyncio.shield(self._ending)

    async def _finish(self, *, committed: bool) -> None:
        await self._open()
        if self._sending:
            await asyncio.wait(self._sending)
        if self._state is State.FATAL:
            raise ProducerFenced
        if self._added or self._has_offsets:
            kind = "commit" if committed else "abort"
            await self._cluster.request(
                kind,
                lambda: self._checked(lambda: self._broker.end_transaction(self._id, self._epoch, committed=committed)),
            )
        self._state = State.READY

    async def _open(self) -> None:
        """A stopped producer has no sender any more: what is asked of it is never answered."""
        if self._closed:
            await elapse(FOREVER_S)

    def _checked(self, request: Callable[[], T]) -> T:
        """A refusal of the coordinator ends the producer's sender, and with it everything."""
        try:
            return request()
        except ConcurrentTransactions:
            raise
        except InvalidProducerEpoch as error:
            self._state = State.FATAL
            raise ProducerFenced from error
        except InvalidTxnState:
            self._state = State.FATAL
            raise

    async def stop(self) -> None:
        """Wait for what is under way."""
        under_way = [task for task in (*self._sending, self._ending) if task is not None and not task.done()]
        if under_way:
            await asyncio.wait(under_way)
        self._closed = True
