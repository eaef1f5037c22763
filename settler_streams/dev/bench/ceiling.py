"""Program (b): the least that an exactly-once loop over aiokafka has to do, as fast as we can make it.

Per partition one transactional producer, and one transaction per batch: decode (the same decoder as the pipeline's),
count per tenant, one output per input, one changelog record per touched tenant, offsets. Records travel in batches that
this program builds itself, and partitions are worked side by side.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiokafka
import msgspec
import uvloop
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.events import decode
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.signals import stop_on_signals
from settler_streams.topology import load_topology

GROUP = "ceiling"
BATCH_BYTES = 512 * 1024
RECORDS_MAX = 16_000
"""Records in one transaction at most, as in the pipeline."""
FETCH_WAIT_S = 1.0

_ENCODER = msgspec.json.Encoder()


class Output(msgspec.Struct, frozen=True):
    """What each input becomes."""

    id: str
    tenant: str
    count: int


class Batches:
    """The batches of one topic-partition."""

    def __init__(self, producer: aiokafka.AIOKafkaProducer, topic: str, partition: int) -> None:
        self._producer = producer
        self._topic = topic
        self._partition = partition
        self._batch = producer.create_batch()
        self.sent: list[Any] = []

    async def send(self) -> None:
        """Send what was added."""
        self.sent.append(await self._producer.send_batch(self._batch, self._topic, partition=self._partition))
        self._batch = self._producer.create_batch()

    async def add(self, key: bytes, value: bytes) -> None:
        """Add one record; a full batch is sent."""
        if self._batch.append(timestamp=None, key=key, value=value) is None:
            await self.send()
            self._batch.append(timestamp=None, key=key, value=value)


async def work(consumer: aiokafka.AIOKafkaConsumer, cluster: Cluster, deployment: str, tp: TopicPartition) -> None:
    """Count the records of one partition until cancelled."""
    name = f"{deployment}.{GROUP}"
    producer = cluster.producer(
        transactional_id=f"{name}-{tp.partition}",
        transaction_timeout_ms=10_000,
        retry_backoff_ms=10,
        max_batch_size=BATCH_BYTES,
        max_request_size=4 * 1024 * 1024,
        linger_ms=0,
        acks="all",
    )
    await producer.start()
    counts: dict[TenantId, int] = {}
    try:
        while True:
            # `getmany` would refuse while another partition waits.
            fetched = await consumer._fetcher.fetched_records(frozenset((tp,)), FETCH_WAIT_S, RECORDS_MAX)  # noqa: SLF001
            records = fetched.get(tp)
            if not records:
                continue
            await producer.begin_transaction()
            outputs = Batches(producer, f"{deployment}.outputs", tp.partition)
            touched: set[TenantId] = set()
            for record in records:
                event = decode(record.value)
                tenant = event.tenantid
                count = counts[tenant] = counts.get(tenant, 0) + 1
                touched.add(tenant)
                await outputs.add(record.key, _ENCODER.encode(Output(event.id, tenant, count)))
            await outputs.send()
            changelog = Batches(producer, f"{deployment}.changelog", tp.partition)
            for tenant in touched:
                await changelog.add(tenant.encode(), str(counts[tenant]).encode())
            await changelog.send()
            await asyncio.gather(*outputs.sent, *changelog.sent)
            offsets = {tp: OffsetAndMetadata(records[-1].offset + 1, "")}
            await producer.send_offsets_to_transaction(offsets, name)
            await producer.commit_transaction()
    finally:
        await producer.stop()


async def run(settings: Settings, partitions: int) -> None:
    """Work on all partitions until SIGTERM or a failure."""
    cluster = Cluster.of(settings)
    tps = [TopicPartition(f"{settings.deployment}.requests", partition) for partition in range(partitions)]
    consumer: aiokafka.AIOKafkaConsumer = cluster.consumer(
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024,
        max_poll_records=RECORDS_MAX,
        fetch_max_wait_ms=25,
    )
    await consumer.start()
    consumer.assign(tps)
    stop = stop_on_signals()
    tasks = [asyncio.create_task(work(consumer, cluster, settings.deployment, tp)) for tp in tps]
    print("bench ready", flush=True)  # noqa: T201 - the parent waits for this line
    try:
        await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await consumer.stop()
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome


def main() -> None:
    """Run until SIGTERM. Settings come from the environment."""
    uvloop.run(run(Settings.from_environment(), load_topology().tenant_partitions))


if __name__ == "__main__":
    main()
