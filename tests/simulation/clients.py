"""aiokafka's clients over the simulated broker: what they promise, and what they are known to get wrong.

In particular ``commit_transaction`` waits for the sends and does not mind that one of them has failed; a commit that
nobody waits for any more goes on; and a producer that has been fenced takes no further call.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from aiokafka.errors import (
    ConcurrentTransactions,
    IllegalOperation,
    InvalidProducerEpoch,
    InvalidTxnState,
    KafkaError,
    ProducerFenced,
)
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata, TopicPartition

from tests.simulation.broker import RECORD_OVERHEAD_BYTES, Broker, Message
from tests.simulation.network import Network, Process

T = TypeVar("T")


class State(enum.Enum):
    """A producer's state, by aiokafka's names."""

    READY = "ready"
    IN_TRANSACTION = "in transaction"
    ENDING = "ending"
    FATAL = "fatal error"


class Batch:
    """Records of one partition, up to the producer's batch size."""

    def __init__(self, bytes_max: int) -> None:
        self.messages: list[Message] = []
        self._bytes_left = bytes_max

    def append(
        self, *, timestamp: int | None, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]] = ()
    ) -> object | None:
        """Take a record; None if it does not fit any more."""
        size = len(key or b"") + len(value or b"") + RECORD_OVERHEAD_BYTES
        if size > self._bytes_left:
            return None
        self._bytes_left -= size
        self.messages.append((key, value, tuple(headers)))
        return self.messages

    def close(self) -> None:
        """Nothing is appended after this."""
        self._bytes_left = 0


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
        self._added: set[TopicPartition] = set()
        self._has_offsets = False
        self._sending: list[asyncio.Future[Any]] = []
        self._last_send: dict[TopicPartition, asyncio.Future[Any]] = {}
        self._ending: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Take the transactional id over."""
        self._epoch = await self._cluster.request(
            "init", lambda: self._broker.init_producer(self._id, self._timeout_s)
        )

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
        tp = TopicPartition(topic, partition)
        answer = self._cluster.process.spawn(self._produce(tp, batch, self._last_send.get(tp)))
        answer.add_done_callback(_noticed)
        self._last_send[tp] = answer
        self._sending.append(answer)
        return answer

    async def _produce(self, tp: TopicPartition, batch: Batch, previous: asyncio.Future[Any] | None) -> int:
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
            return await self._cluster.request("produce", effect)
        except InvalidProducerEpoch as error:
            raise ProducerFenced from error

    async def send_offsets_to_transaction(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], group_id: str
    ) -> None:
        """Commit offsets of a group with the transaction."""
        if self._state is not State.IN_TRANSACTION:
            raise IllegalOperation("Not in the middle of a transaction")
        plain = {tp: offset.offset for tp, offset in offsets.items()}
        self._has_offsets = True
        await asyncio.shield(
            self._background(
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
        self._ending = self._background(self._finish(committed=committed))
        await asyncio.shield(self._ending)

    async def _finish(self, *, committed: bool) -> None:
        if self._sending:
            await asyncio.wait(self._sending)
        if self._state is State.FATAL:
            raise ProducerFenced
        if self._added or self._has_offsets:
            kind = "commit" if committed else "abort"
            await self._cluster.request(
                kind,
                lambda: self._checked(
                    lambda: self._broker.end_transaction(self._id, self._epoch, committed=committed)
                ),
            )
        self._state = State.READY

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

    def _background(self, work: Any) -> asyncio.Future[None]:
        task = self._cluster.process.spawn(work)
        task.add_done_callback(_noticed)
        return task

    async def stop(self) -> None:
        """Wait for what is under way."""
        under_way = [task for task in (*self._sending, self._ending) if task is not None and not task.done()]
        if under_way:
            await asyncio.wait(under_way)
        self._state = State.FATAL


class Consumer:
    """As ``AIOKafkaConsumer`` with assigned partitions."""

    def __init__(
        self,
        cluster: SimulatedCluster,
        *,
        group_id: str | None = None,
        isolation_level: str = "read_uncommitted",
        **_options: Any,
    ) -> None:
        self._cluster = cluster
        self._broker = cluster.broker
        self._group = group_id
        self._isolation = isolation_level
        self._positions: dict[TopicPartition, int] = {}
        self._assigned: list[TopicPartition] = []

    async def start(self) -> None:
        """Connect."""
        await self._cluster.process.gate()

    async def stop(self) -> None:
        """Disconnect."""

    def assign(self, tps: Iterable[TopicPartition]) -> None:
        """Read these; a position has to be sought."""
        self._assigned = list(tps)
        self._positions = {}

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Go on at ``offset``."""
        self._positions[tp] = offset

    async def position(self, tp: TopicPartition) -> int:
        """The offset of the next record."""
        return self._positions[tp]

    async def beginning_offsets(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Where the logs begin."""
        return await self._cluster.request("load", lambda: {tp: self._broker.partition(tp).start for tp in tps})

    async def end_offsets(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Where the logs end, by the consumer's isolation level."""
        isolation = self._isolation
        return await self._cluster.request(
            "load", lambda: {tp: self._broker.partition(tp).end_for(isolation) for tp in tps}
        )

    async def committed(self, tp: TopicPartition) -> int | None:
        """The group's committed offset."""
        if self._group is None:
            raise IllegalOperation("Requires group_id")
        key = self._group, tp
        return await self._cluster.request("load", lambda: self._broker.offsets.get(key))

    async def getmany(
        self, *tps: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[ConsumerRecord[Any, Any]]]:
        """A chunk of what lies beyond the positions."""
        wanted = tps or tuple(self._assigned)
        if not any(self._behind(tp) for tp in wanted):
            await self._broker.until_changed(wanted, timeout_ms / 1000)
        return await self._cluster.request("load", lambda: self._taken(wanted, max_records))

    def _behind(self, tp: TopicPartition) -> bool:
        return self._positions[tp] < self._broker.partition(tp).end_for(self._isolation)

    def _taken(
        self, tps: Iterable[TopicPartition], max_records: int | None
    ) -> dict[TopicPartition, list[ConsumerRecord[Any, Any]]]:
        found = {}
        for tp in tps:
            chunk = max_records or self._cluster.network.random.randint(3, 40)
            records, self._positions[tp] = self._broker.partition(tp).read(
                self._positions[tp], self._isolation, chunk
            )
            if records:
                found[tp] = records
        return found


class Admin:
    """The one question that a session asks an administrative client: which ids topics have."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster

    async def _send_request(self, request: Any) -> Any:
        topics = self._cluster.broker.topics
        found = await self._cluster.request(
            "load", lambda: [(0, name, topics[name].topic_id) for name in request._topics]
        )
        return SimpleNamespace(topics=found)


@dataclass(frozen=True)
class SimulatedCluster:
    """Stands where :class:`~settler_streams.adapters.kafka.cluster.Cluster` does: the clients of one process."""

    broker: Broker
    network: Network
    process: Process

    def producer(self, **options: Any) -> Producer:
        """A producer, not started."""
        return Producer(self, **options)

    def consumer(self, *_topics: str, **options: Any) -> Consumer:
        """A consumer, not started."""
        return Consumer(self, **options)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[Admin]:
        """An administrative client."""
        yield Admin(self)

    async def request(self, kind: str, effect: Callable[[], T]) -> T:
        """Ask the broker."""
        return await self.network.request(self.process, kind, effect)


def _noticed(task: asyncio.Future[Any]) -> None:
    """The error of a send that nobody awaits is no news; aiokafka drops it, too."""
    if not task.cancelled():
        task.exception()


__all__ = ["Batch", "Consumer", "KafkaError", "Producer", "SimulatedCluster"]
