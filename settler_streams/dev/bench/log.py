"""The broker as the benchmark sees it: records put in, committed positions watched, outputs read back."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import aiokafka
from aiokafka.admin import NewTopic
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.cluster import ADMIN_DEADLINE_S, Cluster
from settler_streams.dev.bench.workload import Keyed
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

BATCH_BYTES = 512 * 1024
POLL_INTERVAL_S = 0.1
"""How often positions are asked for; the rate itself comes from the log's own timestamps."""
LOAD_TIMEOUT_MS = 300_000
"""The load's transaction stays open while the programs start; they take seconds."""
READ_DEADLINE_S = 120.0
"""Longest reading of one topic: a million records take four seconds."""

SETTLE_DEADLINE_S = 30.0
"""Markers follow within milliseconds; a transaction that hangs is ended by the broker after ten seconds."""


async def create_topic(cluster: Cluster, topic: str, partitions: int, **config: str) -> None:
    """A topic with the broker's own timestamps."""
    config = {"message.timestamp.type": "LogAppendTime", **{name.replace("_", "."): v for name, v in config.items()}}
    async with cluster.admin() as client:
        new = NewTopic(topic, num_partitions=partitions, replication_factor=1, topic_configs=config)
        await client.create_topics([new], timeout_ms=int(ADMIN_DEADLINE_S * 1000))


async def create_declared(settings: Settings) -> None:
    """Every topic of the deployment, as the topology declares it."""
    async with Cluster.of(settings).admin() as client:
        await broker.apply(client, load_topology().declared(settings.deployment))


async def delete_topics(cluster: Cluster, prefix: str) -> None:
    """Delete every topic whose name starts with ``prefix``."""
    async with cluster.admin() as client:
        found = [topic for topic in await client.list_topics() if topic.startswith(prefix)]
        if found:
            await client.delete_topics(found, timeout_ms=int(ADMIN_DEADLINE_S * 1000))


class Load:
    """Records appended in one transaction: readers of committed records see none of them before :meth:`commit`.

    So the programs can start, join their groups and load their state, and then get everything at once.
    """

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._producer = cluster.producer(
            transactional_id=name,
            transaction_timeout_ms=LOAD_TIMEOUT_MS,
            max_batch_size=BATCH_BYTES,
            max_request_size=4 * 1024 * 1024,
            retry_backoff_ms=10,
            acks="all",
        )
        self._open = False

    async def __aenter__(self) -> Load:
        await self._producer.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        if self._open:
            with contextlib.suppress(KafkaError):  # the topics are deleted with the run
                await self._producer.abort_transaction()
        await self._producer.stop()

    async def append(self, topic: str, records: Iterable[Keyed]) -> None:
        """Append ``records`` to ``topic``, each to its partition, in order; begins the transaction if none is open."""
        if not self._open:
            await self._producer.begin_transaction()
            self._open = True
        batches: dict[int, Any] = {}
        sent: list[asyncio.Future[Any]] = []
        for record in records:
            batch = batches.get(record.partition)
            if batch is None or batch.append(timestamp=None, key=record.key, value=record.value) is None:
                if batch is not None:
                    sent.append(await self._producer.send_batch(batch, topic, partition=record.partition))
                batch = batches[record.partition] = self._producer.create_batch()
                batch.append(timestamp=None, key=record.key, value=record.value)
        for partition, batch in batches.items():
            sent.append(await self._producer.send_batch(batch, topic, partition=partition))
        await asyncio.gather(*sent)

    async def commit(self) -> None:
        """Let readers see everything."""
        await self._producer.commit_transaction()
        self._open = False


def ends_of(topic: str, records: Sequence[Keyed]) -> dict[TopicPartition, int]:
    """The positions behind the last of ``records`` in a topic that holds nothing else."""
    counts = Counter(record.partition for record in records)
    return {TopicPartition(topic, partition): count for partition, count in counts.items()}


async def wait_committed(
    cluster: Cluster, group: str, ends: dict[TopicPartition, int], deadline_s: float, alive: Callable[[], None]
) -> None:
    """Return once ``group`` has committed every position in ``ends``.

    Args:
        alive: raises when a process that should do the work has ended.

    Raises:
        UnavailableError: it did not come to the end in time; says how far it came.
    """
    positions: dict[TopicPartition, int] = {}
    async with cluster.admin() as client:
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    positions = await _committed(client, group, list(ends))
                    if all(positions.get(tp, 0) >= end for tp, end in ends.items()):
                        return
                    alive()
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError as error:
            done = sum(max(0, min(positions.get(tp, 0), end)) for tp, end in ends.items())
            raise UnavailableError(
                f"{group} had come to {done} of {sum(ends.values())} records after {deadline_s:.0f} s"
            ) from error


async def _committed(client: Any, group: str, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
    """The positions of ``group``; none while it has no coordinator: the first group of a broker waits for one."""
    try:
        answer = await client.list_consumer_group_offsets(group, partitions=tps)
    except KafkaError as error:
        if not error.retriable:
            raise
        return {}
    return {tp: stored.offset for tp, stored in answer.items()}


async def wait_appended(
    cluster: Cluster, topic: str, records: int, deadline_s: float, alive: Callable[[], None]
) -> None:
    """Return once ``topic``, written without transactions, holds ``records``; errors as :func:`wait_committed`."""
    count = 0
    async with reader(cluster, topic) as consumer:
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    count = sum((await consumer.end_offsets(consumer.assignment())).values())
                    if count >= records:
                        return
                    alive()
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError as error:
            raise UnavailableError(f"{topic} held {count} of {records} records after {deadline_s:.0f} s") from error


@contextlib.asynccontextmanager
async def reader(
    cluster: Cluster, topic: str, isolation_level: str = "read_committed"
) -> AsyncIterator[aiokafka.AIOKafkaConsumer]:
    """A consumer of all partitions of ``topic`` from their beginnings, in no group."""
    consumer: aiokafka.AIOKafkaConsumer = cluster.consumer(
        isolation_level=isolation_level,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 * 1024 * 1024,
        fetch_max_wait_ms=50,
    )
    await consumer.start()
    try:
        async with cluster.admin() as client:
            described = await client.describe_topics([topic])
        consumer.assign([TopicPartition(topic, entry["partition"]) for entry in described[0]["partitions"]])
        yield consumer
    finally:
        await consumer.stop()


async def read_all(cluster: Cluster, topic: str) -> AsyncIterator[Sequence[Any]]:
    """Every committed record of ``topic``, in chunks, once no transaction is open in it.

    Raises:
        UnavailableError: a transaction stays open, or the end was not reached in time.
    """
    await _settled(cluster, topic)
    async with reader(cluster, topic) as consumer:
        tps = consumer.assignment()
        ends = await consumer.end_offsets(tps)
        await consumer.seek_to_beginning(*tps)
        end_s = asyncio.get_running_loop().time() + READ_DEADLINE_S
        while not all([await consumer.position(tp) >= end for tp, end in ends.items()]):
            if asyncio.get_running_loop().time() > end_s:
                raise UnavailableError(f"{topic} could not be read to its end within {READ_DEADLINE_S:.0f} s")
            for chunk in (await consumer.getmany(timeout_ms=200)).values():
                yield chunk


async def _settled(cluster: Cluster, topic: str) -> None:
    """A commit returns before its markers are written to every partition; until then readers stop short of them."""
    async with reader(cluster, topic) as committed, reader(cluster, topic, "read_uncommitted") as all_records:
        tps = committed.assignment()
        try:
            async with asyncio.timeout(SETTLE_DEADLINE_S):
                while await committed.end_offsets(tps) != await all_records.end_offsets(tps):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError as error:
            raise UnavailableError(f"a transaction in {topic} is still open after {SETTLE_DEADLINE_S:.0f} s") from error
