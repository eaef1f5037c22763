"""An in-memory Kafka broker: topics with ids, transactions with epochs and fencing, committed offsets by group.

It answers at once or raises what aiokafka would raise; how long an answer takes, and whether it arrives, is the
network's business. What it does is held against a real broker in ``test_broker_contract.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from aiokafka.errors import (
    ConcurrentTransactions,
    InvalidProducerEpoch,
    InvalidTxnState,
    MessageSizeTooLargeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.structs import TopicPartition

from tests.simulation.partitions import Headers, Partition, Transaction

BORN_MS = 1_769_903_992_000
"""2026-01-31 23:59:52 UTC: a month ends eight seconds into every simulation, and monthly counts begin anew."""
RECORD_OVERHEAD_BYTES = 70
"""What a batch of one record weighs beside its key and value."""

Message = tuple[bytes | None, bytes | None, Headers]


@dataclass(slots=True)
class Topic:
    """A topic as created."""

    topic_id: str
    partitions: list[Partition]
    message_bytes_max: int


@dataclass(slots=True)
class Producer:
    """What the transaction coordinator knows of a transactional id. ``completing`` has markers still to be written."""

    epoch: int = -1
    transaction: Transaction | None = None
    completing: Transaction | None = None
    last_committed: bool | None = None
    deadline: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Broker:
    """One broker. ``marker_delay_s`` says how long the next marker takes to reach its partition."""

    marker_delay_s: Callable[[], float] = lambda: 0.0
    topics: dict[str, Topic] = field(default_factory=dict)
    offsets: dict[tuple[str, TopicPartition], int] = field(default_factory=dict)
    producers: dict[str, Producer] = field(default_factory=dict)
    timed_out: int = 0
    """Transactions that the coordinator had to end."""
    _made: int = 0
    _watchers: dict[TopicPartition, list[asyncio.Future[None]]] = field(default_factory=dict)

    @property
    def now_ms(self) -> int:
        """The clock behind LogAppendTime."""
        return BORN_MS + int(asyncio.get_running_loop().time() * 1000)

    def create_topic(self, name: str, partitions: int, message_bytes_max: int) -> None:
        """Create a topic; one that is deleted and made again gets another id and begins at offset 0."""
        self._made += 1
        made = [Partition(TopicPartition(name, number)) for number in range(partitions)]
        self.topics[name] = Topic(str(uuid.UUID(int=self._made)), made, message_bytes_max)
        for group, tp in list(self.offsets):
            if tp.topic == name:
                del self.offsets[group, tp]

    def partition(self, tp: TopicPartition) -> Partition:
        """The log of ``tp``."""
        topic = self.topics.get(tp.topic)
        if topic is None or tp.partition >= len(topic.partitions):
            raise UnknownTopicOrPartitionError(f"{tp.topic}-{tp.partition}")
        return topic.partitions[tp.partition]

    def append(self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers = ()) -> int:
        """What a plain producer does: one record, visible at once unless a transaction is open in front of it."""
        return self._write(TopicPartition(topic, partition), [(key, value, headers)], None)

    def produce(self, transactional_id: str, epoch: int, tp: TopicPartition, messages: Iterable[Message]) -> int:
        """Write a batch within the producer's transaction, in which ``tp`` takes part already."""
        transaction = self._current(transactional_id, epoch).transaction
        if transaction is None or tp not in transaction.partitions:
            raise InvalidTxnState(f"{tp} takes no part in a transaction of {transactional_id}")
        return self._write(tp, list(messages), transaction)

    def _write(self, tp: TopicPartition, messages: list[Message], by: Transaction | None) -> int:
        partition = self.partition(tp)
        limit = self.topics[tp.topic].message_bytes_max
        if sum(len(k or b"") + len(v or b"") + RECORD_OVERHEAD_BYTES for k, v, _ in messages) > limit:
            raise MessageSizeTooLargeError(f"{tp.topic} takes {limit} bytes")
        first = partition.end
        for key, value, headers in messages:
            partition.append(self.now_ms, key, value, headers, by)
        self._changed(tp)
        return first

    def init_producer(self, transactional_id: str, timeout_s: float) -> int:
        """A new epoch: fences the former producer, and ends its transaction first.

        Raises:
            ConcurrentTransactions: that transaction is still being ended; ask again.
        """
        producer = self.producers.setdefault(transactional_id, Producer())
        if producer.transaction is not None:
            producer.epoch += 1
            self._decide(producer, committed=False)
        if producer.completing is not None:
            raise ConcurrentTransactions
        producer.epoch += 1
        producer.last_committed = None
        return producer.epoch

    def add_partition(self, transactional_id: str, epoch: int, tp: TopicPartition, timeout_s: float) -> None:
        """Let ``tp`` take part in the transaction, which begins with the first one."""
        self.partition(tp)
        self._begun(transactional_id, epoch, timeout_s).partitions.setdefault(tp, False)

    def add_offsets(
        self, transactional_id: str, epoch: int, group: str, offsets: dict[TopicPartition, int], timeout_s: float
    ) -> None:
        """Commit offsets of ``group`` with the transaction."""
        transaction = self._begun(transactional_id, epoch, timeout_s)
        transaction.offsets.update({(group, tp): offset for tp, offset in offsets.items()})

    def _begun(self, transactional_id: str, epoch: int, timeout_s: float) -> Transaction:
        producer = self._current(transactional_id, epoch)
        if producer.completing is not None:
            raise ConcurrentTransactions
        if producer.transaction is None:
            transaction = producer.transaction = Transaction(transactional_id, epoch)
            producer.deadline = asyncio.get_running_loop().call_later(timeout_s, self._time_out, producer, transaction)
        return producer.transaction

    def end_transaction(self, transactional_id: str, epoch: int, *, committed: bool) -> None:
        """Decide the transaction. The answer does not wait for the markers; repeating the request changes nothing."""
        producer = self._current(transactional_id, epoch)
        if producer.transaction is not None:
            self._decide(producer, committed=committed)
        elif producer.last_committed is not committed:
            raise InvalidTxnState(f"{transactional_id} has no transaction to end")

    def _current(self, transactional_id: str, epoch: int) -> Producer:
        producer = self.producers[transactional_id]
        if producer.epoch != epoch:
            raise InvalidProducerEpoch(f"{transactional_id}: epoch {epoch}, the present one is {producer.epoch}")
        return producer

    def _time_out(self, producer: Producer, transaction: Transaction) -> None:
        if producer.transaction is transaction:
            self.timed_out += 1
            producer.epoch += 1
            self._decide(producer, committed=False)

    def _decide(self, producer: Producer, *, committed: bool) -> None:
        transaction = producer.transaction
        assert transaction is not None
        if producer.deadline is not None:
            producer.deadline.cancel()
        transaction.committed = producer.last_committed = committed
        producer.transaction, producer.completing = None, transaction
        loop = asyncio.get_running_loop()
        for tp in transaction.partitions:
            loop.call_later(self.marker_delay_s(), self._seal, producer, transaction, tp)
        loop.call_later(self.marker_delay_s(), self._settle_offsets, producer, transaction)

    def _seal(self, producer: Producer, transaction: Transaction, tp: TopicPartition) -> None:
        self.partition(tp).seal(transaction)
        transaction.partitions[tp] = True
        self._complete(producer, transaction)
        self._changed(tp)

    def _settle_offsets(self, producer: Producer, transaction: Transaction) -> None:
        if transaction.committed:
            self.offsets.update(transaction.offsets)
        transaction.offsets = {}
        self._complete(producer, transaction)

    def _complete(self, producer: Producer, transaction: Transaction) -> None:
        done = all(transaction.partitions.values()) and not transaction.offsets
        if done and producer.completing is transaction:
            producer.completing = None

    async def until_changed(self, tps: Iterable[TopicPartition], wait_s: float) -> None:
        """Wait until something happens in one of ``tps``, ``wait_s`` seconds at most."""
        loop = asyncio.get_running_loop()
        changed = loop.create_future()
        watched = [self._watchers.setdefault(tp, []) for tp in tps]
        for watchers in watched:
            watchers.append(changed)
        timer = loop.call_later(wait_s, _wake, changed)
        try:
            await changed
        finally:
            timer.cancel()
            for watchers in watched:
                watchers.remove(changed)

    def _changed(self, tp: TopicPartition) -> None:
        for watcher in self._watchers.get(tp, ()):
            _wake(watcher)

    def digest(self) -> str:
        """A hash over every byte, offset and time that was ever written, and over all committed offsets."""
        everything = hashlib.sha256()
        for name, topic in self.topics.items():
            for partition in topic.partitions:
                for entry in partition.history:
                    record = entry.record
                    what = (record.timestamp, record.key, record.value, record.headers) if record else "marker"
                    everything.update(repr((name, partition.tp.partition, entry.offset, what)).encode())
        everything.update(repr(sorted(self.offsets.items())).encode())
        return everything.hexdigest()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
