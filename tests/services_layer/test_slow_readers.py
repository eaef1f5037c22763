"""The SDK's reader passes over nothing that is kept: behind a deletion, or arriving as it looks for its place."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from collections.abc import AsyncIterator
from typing import Any

import aiokafka
import pytest
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.client import Caller, KafkaTransport
from settler_streams.events import JobFinished, JobStatus
from settler_streams.ids import TenantId, partition_of, uuid7
from settler_streams.services import EventPublisher
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology
from tests.services.interface import Service, Services

pytestmark = pytest.mark.services

TOPOLOGY = load_topology()
TOPIC = "job-results"
READ_WITHIN_S = 30.0


@pytest.fixture
async def settings(services: Services, kafka: Service, deployment: str) -> Settings:
    """A deployment in which nobody works."""
    found = services.settings.model_copy(update={"deployment": deployment})
    async with Cluster.of(found).admin() as client:
        await apply(client, TOPOLOGY.declared(deployment))
    return found


@pytest.fixture
async def publisher(settings: Settings) -> AsyncIterator[EventPublisher]:
    publisher = EventPublisher(settings, source="/test")
    await publisher.start()
    yield publisher
    await publisher.stop()


async def finish(publisher: EventPublisher, tenant: TenantId) -> str:
    """A result; returns its job."""
    job = uuid7(time.time_ns() // 1_000_000)
    done = JobFinished(
        job_id=job, status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation", requested_at_ms=0,
        finished_at_ms=0, worker_us=0,
    )  # fmt: skip
    await publisher.publish(TOPIC, tenant, tenant, done)
    return job


async def test_a_reader_whose_place_was_deleted_goes_on_with_the_oldest_that_is_kept(
    settings: Settings, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumers: list[aiokafka.AIOKafkaConsumer] = []
    new = Cluster.consumer

    def remembered(self: Cluster, *topics: str, **options: Any) -> aiokafka.AIOKafkaConsumer:
        consumers.append(new(self, *topics, **options))
        return consumers[-1]

    monkeypatch.setattr(Cluster, "consumer", remembered)
    tenant = TenantId(uuid7(1))
    jobs = [await finish(publisher, tenant) for _ in range(4)]
    tp = TopicPartition(full_name(settings.deployment, TOPIC), partition_of(tenant, TOPOLOGY.partitions(TOPIC)))
    results = KafkaTransport(settings).results(Caller(tenant, tenant), "beginning")
    async with asyncio.timeout(READ_WITHIN_S), contextlib.aclosing(results) as read:
        assert (await anext(read)).job_id == jobs[0]
        async with Cluster.of(settings).admin() as client:
            await client.delete_records({tp: RecordsToDelete(before_offset=3)})
        consumers[0].seek(tp, 1)  # as if it had fetched no more than it has read
        assert (await anext(read)).job_id == jobs[3]


async def test_a_record_that_arrives_after_the_look_by_time_is_read(
    settings: Settings, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = TenantId(uuid7(2))
    await finish(publisher, tenant)
    look, arrived = aiokafka.AIOKafkaConsumer.offsets_for_times, []

    async def just_before(self: aiokafka.AIOKafkaConsumer, times: dict[TopicPartition, int]) -> Any:
        found = await look(self, times)
        arrived.append(await finish(publisher, tenant))
        return found

    monkeypatch.setattr(aiokafka.AIOKafkaConsumer, "offsets_for_times", just_before)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
    results = KafkaTransport(settings).results(Caller(tenant, tenant), later)
    async with asyncio.timeout(READ_WITHIN_S), contextlib.aclosing(results) as read:
        assert (await anext(read)).job_id == arrived[0]
