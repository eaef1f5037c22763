"""What compacted topics still say of one tenant: the folds' changelogs, and the state that processes follow.

It is looked for by the tenant's id, in the key and in the bytes of the value, so a fold that keeps something new of
tenants is looked through as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiokafka
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, partition_of
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name

CALL_S_MAX = 30.0
"""Longest wait for one answer of the broker, and for the next records where there are some."""
POLL_MS = 500


class TenantState:
    """Reads each topic once, from its beginning on; a later look goes on where the last one ended."""

    def __init__(self, settings: Settings, topology: Topology, tenant_id: TenantId, root_id: TenantId) -> None:
        self._settings = settings
        self._topology = topology
        self._id = tenant_id.encode()
        self._marker = b"erased/" + self._id
        self._root_id = root_id
        self._consumer: aiokafka.AIOKafkaConsumer
        self._found: dict[TopicPartition, set[bytes]] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[TenantState]:
        """Connect.

        Raises:
            UnavailableError: Kafka did not answer.
        """
        self._consumer = Cluster.of(self._settings).consumer(
            isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="earliest"
        )
        try:
            async with _bounded():
                await self._consumer.start()
                tps = self._partitions()
                self._consumer.assign(tps)
                await self._consumer.seek_to_beginning(*tps)
            self._found = {tp: set() for tp in tps}
            yield self
        finally:
            async with _bounded():
                await self._consumer.stop()

    async def mentions(self) -> dict[str, list[str]]:
        """The keys, by topic, whose newest value names the tenant; but for the markers that it was erased.

        Raises:
            UnavailableError: Kafka did not answer.
        """
        async with _bounded():
            ends: dict[TopicPartition, int] = await self._consumer.end_offsets(list(self._found))
        behind, advanced_s = set(ends), time.monotonic()
        while behind:
            async with _bounded():
                fetched = await self._consumer.getmany(*behind, timeout_ms=POLL_MS)
                left = {tp for tp in behind if await self._consumer.position(tp) < ends[tp]}
            if fetched or left != behind:
                advanced_s = time.monotonic()
            elif time.monotonic() - advanced_s > CALL_S_MAX:  # a partition without a leader, say
                raise UnavailableError(f"nothing more of {sorted({tp.topic for tp in left})} within {CALL_S_MAX:.0f} s")
            behind = left
            for tp, records in fetched.items():
                for record in records:
                    self._look_at(self._found[tp], record.key or b"", record.value)
        found: dict[str, list[str]] = {}
        for tp, keys in self._found.items():
            if keys:
                found.setdefault(tp.topic, []).extend(sorted(key.decode(errors="replace") for key in keys))
        return found

    def _look_at(self, found: set[bytes], key: bytes, value: bytes | None) -> None:
        if value is not None and key != self._marker and (self._id in key or self._id in value):
            found.add(key)
        else:
            found.discard(key)

    def _partitions(self) -> list[TopicPartition]:
        """Where the tenant's state lies: in its root's partition, but for folds that are not divided by tenant."""
        topology = self._topology
        counts = {fold.changelog: topology.fold_partitions(fold.role) for fold in topology.folds}
        counts |= {
            topic.name: topology.partitions(topic.name) for topic in topology.topics if topic.cleanup == "compact"
        }
        tps = []
        for name, count in counts.items():
            by_tenant = count == topology.tenant_partitions
            numbers = [partition_of(self._root_id, count)] if by_tenant else range(count)
            tps += [TopicPartition(full_name(self._settings.deployment, name), number) for number in numbers]
        return tps


@asynccontextmanager
async def _bounded() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CALL_S_MAX):
            yield
    except (KafkaError, TimeoutError) as error:
        raise UnavailableError(f"Kafka did not answer: {error!r}") from error
