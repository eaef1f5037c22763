"""All records of one tenant that Kafka still holds, a topic at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiokafka
import msgspec
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import dead_letter_form as form
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.reading import advance
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, partition_of
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name

CALL_S_MAX = 30.0
"""Longest wait for one answer of the broker, and for the next records where there are some."""
DEAD_LETTERS = "dead-letters"
"""Whose records have their own key in a header."""


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A record as it lies in Kafka; ``topic`` is the declared name, ``timestamp`` Unix milliseconds.

    ``key`` of a dead letter is that of the record which was refused.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class _Attributes(msgspec.Struct):
    tenantid: str


_ATTRIBUTES = msgspec.json.Decoder(_Attributes)


def whose(key: bytes | None, value: bytes | None) -> str | None:
    """The tenant that an event names, whether or not the rest of it is right; else its key, where that is text."""
    try:
        return _ATTRIBUTES.decode(value or b"").tenantid
    except (msgspec.DecodeError, UnicodeDecodeError):
        return (key or b"").decode(errors="replace")


class TenantRecords:
    """Reads what belongs to a tenant; what is appended after it was opened is not read."""

    def __init__(self, settings: Settings, topology: Topology, tenant_id: TenantId, root_id: TenantId) -> None:
        self._settings = settings
        self._topology = topology
        self._tenant_id = tenant_id
        self._root_id = root_id
        self._consumer: aiokafka.AIOKafkaConsumer
        self._ends: dict[TopicPartition, int] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[TenantRecords]:
        """Connect, and remember where the topics end now.

        Raises:
            UnavailableError: Kafka did not answer.
        """
        self._consumer = Cluster.of(self._settings).consumer(
            isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="none"
        )
        try:
            async with _bounded():
                await self._consumer.start()
                tps = [tp for topic in self.topics() for tp in self._partitions(topic)]
                self._consumer.assign(tps)
                self._ends = dict(await self._consumer.end_offsets(tps))
                self._consumer.pause(*tps)
            yield self
        finally:
            await self._consumer.stop()

    def topics(self) -> list[str]:
        """The topics in which a tenant has records: those of events, and the dead letters."""
        return [topic.name for topic in self._topology.topics if topic.events or topic.name == DEAD_LETTERS]

    async def read(self, topic: str) -> AsyncIterator[TenantRecord]:
        """The tenant's records of ``topic``, in order within a partition.

        Raises:
            UnavailableError: Kafka did not answer, or gave nothing more of what there was.
        """
        for tp in self._partitions(topic):
            async with _bounded():
                position = (await self._consumer.beginning_offsets([tp]))[tp]
            self._consumer.seek(tp, position)
            self._consumer.resume(tp)
            while position < self._ends[tp]:
                async with _bounded():
                    records, position = await advance(self._consumer, tp, position)
                for record in records:
                    key = dict(record.headers).get(form.KEY) if topic == DEAD_LETTERS else record.key
                    if record.offset < self._ends[tp] and whose(key, record.value) == self._tenant_id:
                        yield TenantRecord(topic, tp.partition, record.offset, record.timestamp, key, record.value)
            self._consumer.pause(tp)

    def _partitions(self, topic: str) -> list[TopicPartition]:
        """Where the tenant's records lie: in its root's partition, but for topics that have another key."""
        declared = next(each for each in self._topology.topics if each.name == topic)
        count = self._topology.partitions(topic)
        keyed = declared.key == "root-tenant"
        numbers = [partition_of(self._root_id, count)] if keyed else range(count)
        return [TopicPartition(full_name(self._settings.deployment, topic), number) for number in numbers]


@asynccontextmanager
async def _bounded() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CALL_S_MAX):
            yield
    except (KafkaError, TimeoutError) as error:
        raise UnavailableError(f"Kafka did not answer: {error!r}") from error
