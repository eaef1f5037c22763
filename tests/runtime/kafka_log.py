"""The committed log as a test sees it: write records, read a topic to its end, wait until it holds something."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiokafka
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.projection import read_positions
from settler_streams.events import Envelope, Part, decode
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name

WAIT_S_MAX = 60.0
"""A takeover waits for a rebalance, after a crash for the session timeout of ten seconds too; machines can be slow."""

Record = ConsumerRecord[Any, Any]


@dataclass(frozen=True)
class KafkaLog:
    """The topics of one deployment."""

    settings: Settings
    topology: Topology

    async def create(self, *, without: Iterable[str] = ()) -> None:
        """Create the declared topics."""
        missing = {self.full(name) for name in without}
        declared = [d for d in self.topology.declared(self.settings.deployment) if d.topic not in missing]
        async with Cluster.of(self.settings).admin() as client:
            await apply(client, declared)

    def full(self, name: str) -> str:
        """A topic's name on the broker."""
        return full_name(self.settings.deployment, name)

    @asynccontextmanager
    async def consumer(self, **options: Any) -> AsyncIterator[aiokafka.AIOKafkaConsumer]:
        """A consumer that commits nothing unless asked to."""
        chosen = {"isolation_level": "read_committed", "auto_offset_reset": "none", **options}
        consumer = Cluster.of(self.settings).consumer(
            enable_auto_commit=False,
            fetch_max_wait_ms=50,
            max_partition_fetch_bytes=4 * 1024 * 1024,
            **chosen,
        )
        await consumer.start()
        try:
            yield consumer
        finally:
            await consumer.stop()

    @asynccontextmanager
    async def producer(self, **options: Any) -> AsyncIterator[aiokafka.AIOKafkaProducer]:
        """A producer."""
        producer = Cluster.of(self.settings).producer(max_request_size=4 * 1024 * 1024, **options)
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def append(
        self,
        topic: str,
        partition: int,
        records: Iterable[tuple[bytes | None, bytes | None]],
        headers: list[tuple[str, bytes | None]] | None = None,
    ) -> list[int]:
        """Append keys and values in order; returns their offsets."""
        async with self.producer() as producer:
            sent = [
                await producer.send(self.full(topic), value, key=key, partition=partition, headers=headers)
                for key, value in records
            ]
            return [stored.offset for stored in await asyncio.gather(*sent)]

    async def read(
        self, topic: str, partitions: Sequence[int] | None = None, *, isolation: str = "read_committed"
    ) -> list[Record]:
        """Every record of ``topic`` up to its present end, in order within each partition.

        The end counts what is not yet decided: a commit is answered a moment before its markers lie in the log.
        """
        tps = self._tps(topic, partitions)
        async with self.consumer(isolation_level="read_uncommitted") as consumer:
            ends = await consumer.end_offsets(tps)
        async with self.consumer(isolation_level=isolation) as consumer:
            consumer.assign(tps)
            await consumer.seek_to_beginning(*tps)
            found: list[Record] = []
            async with asyncio.timeout(WAIT_S_MAX):
                while any([await consumer.position(tp) < ends[tp] for tp in tps]):
                    for records in (await consumer.getmany(timeout_ms=100)).values():
                        found += records
        return sorted(found, key=lambda record: (record.partition, record.offset))

    async def events(self, topic: str, partitions: Sequence[int] | None = None) -> list[Envelope[Part]]:
        """As :meth:`read`, decoded."""
        return [decode(record.value) for record in await self.read(topic, partitions)]

    async def until(self, topic: str, enough: Callable[[list[Record]], bool], *, wait_s: float = WAIT_S_MAX) -> Any:
        """Follow ``topic`` from its beginning until ``enough`` says so of what has been committed; returns that."""
        async with self.consumer() as consumer:
            tps = self._tps(topic, None)
            consumer.assign(tps)
            await consumer.seek_to_beginning(*tps)
            found: list[Record] = []
            try:
                async with asyncio.timeout(wait_s):
                    while not enough(found):
                        for records in (await consumer.getmany(timeout_ms=1000)).values():
                            found += records
            except TimeoutError:
                raise AssertionError(f"{topic} holds {len(found)} records and not what was waited for") from None
        return found

    async def until_committed(self, group: str, topic: str, partition: int, offset: int) -> None:
        """Wait until the committed offset of the deployment's ``group`` is ``offset``, and no other than that.

        A commit is answered a moment before the offsets are the group's: their marker goes a way of its own.
        """
        async with asyncio.timeout(WAIT_S_MAX):
            while (found := await self.committed_offsets(group, topic, partition)) is None or found < offset:
                pass
        assert found == offset

    async def committed_offsets(self, group: str, topic: str, partition: int) -> int | None:
        """The committed offset of the deployment's ``group`` now."""
        async with self.consumer(group_id=f"{self.settings.deployment}.{group}") as consumer:
            tp = TopicPartition(self.full(topic), partition)
            consumer.assign([tp])
            offset: int | None = await consumer.committed(tp)
            return offset

    async def until_recorded(
        self, pool: TenantConnectionPool, role: str, topic: str, positions: Mapping[int, int]
    ) -> None:
        """Wait until a projection's stored position in ``topic`` has reached ``positions``, by partition."""
        full = self.full(topic)
        stored: dict[int, int] = {}
        async with asyncio.timeout(WAIT_S_MAX):
            while any(stored.get(partition, 0) < position for partition, position in positions.items()):
                rows = await read_positions(pool, f"{self.settings.deployment}.{role}")
                stored = {row.partition: row.next_offset for row in rows if row.topic == full}

    def _tps(self, topic: str, partitions: Sequence[int] | None) -> list[TopicPartition]:
        numbers = range(self._partitions(topic)) if partitions is None else partitions
        return [TopicPartition(self.full(topic), number) for number in numbers]

    def _partitions(self, topic: str) -> int:
        for fold in self.topology.folds:
            if topic in (fold.changelog, fold.journal):
                return self.topology.fold_partitions(fold.role)
        return self.topology.partitions(topic)
