"""The clients of one process over the simulated broker, behind the seam where the product gets all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from aiokafka.errors import IllegalOperation, UnknownTopicOrPartitionError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata, TopicPartition

from tests.simulation.broker import Broker
from tests.simulation.network import Network, Process
from tests.simulation.producer import Producer
from tests.simulation.virtual_time import elapse

BATCH_RECORDS_MAX = 12
"""Records of one input in one batch at most; mostly fewer, so that a seed has many steps."""
PATIENCE = 5
"""An idle fetch lasts so many times longer than it was asked to: it spares most of an idle fold's turns."""

T = TypeVar("T")


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
        if max_records is not None:
            return await self._arrived(timeout_ms / 1000)
        wanted = tps or tuple(self._assigned)
        if not any(self._behind(tp) for tp in wanted):
            await self._broker.until_changed(wanted, timeout_ms / 1000)
        return await self._cluster.request("load", lambda: self._taken(wanted))

    def last_stable_offset(self, _tp: TopicPartition) -> int | None:
        """Unknown, as before the first answer; it is for metrics only."""
        return None

    async def _arrived(self, wait_s: float) -> dict[TopicPartition, list[ConsumerRecord[Any, Any]]]:
        """The next batch of a fold: some of what has arrived, of some of the inputs, in any order of the inputs.

        A request is under way all the time, so none of them fails here.
        """
        process, network = self._cluster.process, self._cluster.network
        await process.gate()
        deadline_s = asyncio.get_running_loop().time() + PATIENCE * wait_s
        while not any(self._broker.partition(tp).has_records(self._positions[tp]) for tp in self._assigned):
            if (left_s := deadline_s - asyncio.get_running_loop().time()) <= 0:
                return {}
            await self._broker.until_changed(self._assigned, left_s)
        await elapse(network.latency_s())
        await process.gate()
        found = {}
        for tp in network.random.sample(self._assigned, len(self._assigned)):
            if network.random.random() < 0.8:
                most = network.random.randint(1, BATCH_RECORDS_MAX)
                records, self._positions[tp] = self._broker.partition(tp).read(
                    self._positions[tp], self._isolation, most
                )
                if records:
                    found[tp] = records
        return found

    def _behind(self, tp: TopicPartition) -> bool:
        return self._positions[tp] < self._broker.partition(tp).end_for(self._isolation)

    def _taken(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, list[ConsumerRecord[Any, Any]]]:
        found = {}
        for tp in tps:
            chunk = self._cluster.network.random.randint(3, 40)
            records, self._positions[tp] = self._broker.partition(tp).read(self._positions[tp], self._isolation, chunk)
            if records:
                found[tp] = records
        return found


class Admin:
    """What a session asks an administrative client: which ids topics have, and which offsets a group has committed."""

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
