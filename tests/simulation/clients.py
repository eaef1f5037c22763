"""The clients of one process over the simulated broker, behind the seam where the product gets all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

from aiokafka.errors import IllegalOperation, UnknownTopicOrPartitionError
from aiokafka.structs import ConsumerRecord, TopicPartition

from tests.simulation.broker import Broker
from tests.simulation.network import Network, Process
from tests.simulation.producer import Producer

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
            records, self._positions[tp] = self._broker.partition(tp).read(self._positions[tp], self._isolation, chunk)
            if records:
                found[tp] = records
        return found


class Admin:
    """The one question that a session asks an administrative client: which ids topics have."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster

    async def _send_request(self, request: Any) -> Any:
        found = await self._cluster.request("load", lambda: [self._topic(name) for name in request._topics])
        return SimpleNamespace(topics=found)

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
