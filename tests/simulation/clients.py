"""The clients of one process over the simulated broker, behind the seam where the product gets all of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from aiokafka.errors import ConsumerStoppedError, IllegalOperation, UnknownTopicOrPartitionError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata, TopicPartition

from tests.simulation.broker import Broker
from tests.simulation.network import Network, Process
from tests.simulation.producer import Producer

T = TypeVar("T")
Records = dict[TopicPartition, list[ConsumerRecord[Any, Any]]]

BATCH_RECORDS_MAX = 12
"""Records of one input in one answer at most; mostly fewer, so that a seed has many steps."""
INPUT_ANSWERS = 0.8
"""How likely one input has a part in an answer: records of several arrive in any order."""
PATIENCE = 5
"""An idle fetch lasts so many times longer than it was asked to: it spares most of an idle fold's turns."""


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
        self._paused: set[TopicPartition] = set()
        self._stable_ends: dict[TopicPartition, int] = {}
        self._unknown: set[str] = set()
        self._stopped = False

    async def start(self) -> None:
        """Connect."""
        await self._cluster.process.gate()

    async def stop(self) -> None:
        """Disconnect."""
        self._stopped = True

    def assign(self, tps: Iterable[TopicPartition]) -> None:
        """Read these; a position has to be sought."""
        self._assigned = list(tps)
        self._positions = {}

    def seek(self, tp: TopicPartition, offset: int) -> None:
        """Go on at ``offset``."""
        self._positions[tp] = offset

    def pause(self, *tps: TopicPartition) -> None:
        """Read none of these."""
        self._paused |= set(tps)

    def resume(self, *tps: TopicPartition) -> None:
        """Read them again."""
        self._paused -= set(tps)

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

    def last_stable_offset(self, tp: TopicPartition) -> int | None:
        """Where what was decided ended, by the last answer; None before the first."""
        return self._stable_ends.get(tp)

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        """The partitions, as far as this client knows; it looks again whenever it is refused a partition."""
        return None if topic in self._unknown else set(range(len(self._broker.topics[topic].partitions)))

    async def getmany(self, *tps: TopicPartition, timeout_ms: int = 0, max_records: int | None = None) -> Records:
        """What lies beyond the positions: a chunk of ``tps``, or something of whatever is assigned.

        Raises:
            OffsetOutOfRangeError: a log does not hold the position.
            ConsumerStoppedError: this consumer has been stopped.
        """
        self._check_running()
        if tps:
            return await self._chunk(tps, timeout_ms / 1000)
        return await self._something(PATIENCE * timeout_ms / 1000, max_records or sys.maxsize)

    def _check_running(self) -> None:
        if self._stopped:
            raise ConsumerStoppedError

    async def _chunk(self, tps: tuple[TopicPartition, ...], wait_s: float) -> Records:
        if not any(self._positions[tp] < self._broker.partition(tp).end_for(self._isolation) for tp in tps):
            await self._broker.until_changed(tps, wait_s)
        return await self._cluster.request("load", lambda: self._chunk_now(tps))

    def _chunk_now(self, tps: tuple[TopicPartition, ...]) -> Records:
        found = {}
        for tp in tps:
            chunk = self._cluster.network.random.randint(3, 40)
            records, self._positions[tp] = self._broker.partition(tp).read(self._positions[tp], self._isolation, chunk)
            if records:
                found[tp] = records
        return found

    async def _something(self, wait_s: float, records_max: int) -> Records:
        """Some of what has arrived, of some of the inputs, in any order of the inputs."""
        loop, process = asyncio.get_running_loop(), self._cluster.process
        deadline_s = loop.time() + wait_s
        await process.gate()
        while not self._is_behind():
            if (left_s := deadline_s - loop.time()) <= 0:
                return {}
            await self._broker.until_changed(self._assigned, left_s)
            await process.gate()
        found, positions, ends = await self._cluster.request("fetch", lambda: self._something_now(records_max))
        self._check_running()
        self._positions |= positions
        self._stable_ends |= ends
        return found

    def _is_behind(self) -> bool:
        """Whether there are records to be had. Positions move over markers and what was aborted.

        A topic that is gone is no error: the client asks for its partitions again and again.
        """
        for tp in self._readable():
            partition, position = self._broker.partition(tp), self._positions[tp]
            if position != partition.end_for(self._isolation):
                records, self._positions[tp] = partition.read(position, self._isolation, 1)
                if records:
                    self._positions[tp] = position
                    return True
        return False

    def _something_now(self, records_max: int) -> tuple[Records, dict[TopicPartition, int], dict[TopicPartition, int]]:
        """Records, the positions after them, and the last stable offsets."""
        random = self._cluster.network.random
        readable = self._readable()
        random.shuffle(readable)
        found: Records = {}
        positions, ends = {}, {}
        for tp in readable:
            partition = self._broker.partition(tp)
            ends[tp] = partition.stable_end
            if records_max > 0 and random.random() < INPUT_ANSWERS:
                most = min(records_max, random.randint(1, BATCH_RECORDS_MAX))
                records, positions[tp] = partition.read(self._positions[tp], self._isolation, most)
                if records:
                    found[tp] = records
                    records_max -= len(records)
        return found, positions, ends

    def _readable(self) -> list[TopicPartition]:
        self._unknown = {tp.topic for tp in self._assigned if tp.topic not in self._broker.topics}
        return [tp for tp in self._assigned if tp.topic not in self._unknown and tp not in self._paused]


class Admin:
    """What a session asks an administrative client: the ids of topics, and where its group stands."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster

    async def _send_request(self, request: Any) -> Any:
        found = await self._cluster.request("load", lambda: [self._topic(name) for name in request._topics])
        return SimpleNamespace(topics=found)

    async def list_consumer_group_offsets(
        self, group: str, *, partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """A committed offset for each partition, -1 where there is none."""
        offsets = self._cluster.broker.offsets
        return await self._cluster.request(
            "load", lambda: {tp: OffsetAndMetadata(offsets.get((group, tp), -1), "") for tp in partitions}
        )

    def _topic(self, name: str) -> tuple[int, str, str]:
        """Error code, name and id."""
        topic = self._cluster.broker.topics.get(name)
        return (UnknownTopicOrPartitionError.errno, name, "") if topic is None else (0, name, topic.topic_id)


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
