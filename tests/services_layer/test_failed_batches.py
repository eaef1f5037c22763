"""A batch that has failed leaves the next ones a producer whose sequence numbers the broker takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import aiokafka
import pytest
from aiokafka.errors import KafkaConnectionError
from aiokafka.producer.message_accumulator import MessageBatch
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.client import Caller, KafkaTransport
from settler_streams.errors import UnavailableError
from settler_streams.events import FileRecords, JobRequested, MatchRules
from settler_streams.ids import JobId, TenantId, partition_of, uuid7
from settler_streams.services import EventPublisher
from settler_streams.services import publisher as publisher_module
from settler_streams.services.publisher import Encoded
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology
from tests.services.interface import Service, Services

pytestmark = pytest.mark.services

TOPOLOGY = load_topology()
TOPIC = "usage-events"
KEYS = {partition_of(str(number), TOPOLOGY.partitions(TOPIC)): str(number) for number in range(400)}
"""One for each partition."""
KEY, OTHER = KEYS[0], KEYS[1]


@pytest.fixture
async def settings(services: Services, kafka: Service, deployment: str) -> Settings:
    """A deployment in which nobody works."""
    found = services.settings.model_copy(update={"deployment": deployment})
    async with Cluster.of(found).admin() as client:
        await apply(client, TOPOLOGY.declared(deployment))
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[aiokafka.AIOKafkaProducer]:
    """The producers of the test, the latest last."""
    producers: list[aiokafka.AIOKafkaProducer] = []
    new = Cluster.producer

    def remembered(self: Cluster, **options: Any) -> aiokafka.AIOKafkaProducer:
        producers.append(new(self, **options))
        return producers[-1]

    monkeypatch.setattr(Cluster, "producer", remembered)
    return producers


@pytest.fixture
async def publisher(settings: Settings, made: list[aiokafka.AIOKafkaProducer]) -> AsyncIterator[EventPublisher]:
    """One that has published to each partition."""
    publisher = EventPublisher(settings, source="/test")
    await publisher.start()
    await publisher.publish_encoded([Encoded(TOPIC, key, b"first") for key in KEYS.values()])
    yield publisher
    await publisher.stop()
    assert all(producer._closed for producer in made)


def skip(producer: aiokafka.AIOKafkaProducer, settings: Settings, topic: str, key: str) -> None:
    """Use up a number, as the library does for a batch that it gives up."""
    tp = TopicPartition(full_name(settings.deployment, topic), partition_of(key, TOPOLOGY.partitions(topic)))
    producer._txn_manager.increment_sequence_number(tp, 1)


@contextmanager
def leaderless(producer: aiokafka.AIOKafkaProducer) -> Iterator[None]:
    """No partition has a leader that the producer knows of."""
    with mock.patch.object(producer.client.cluster, "leader_for_partition", return_value=None):
        yield


async def publish(publisher: EventPublisher, key: str, value: bytes = b"x") -> None:
    await publisher.publish_encoded([Encoded(TOPIC, key, value)])


async def test_a_publisher_goes_on_after_the_broker_has_refused_a_sequence(
    publisher: EventPublisher, settings: Settings, made: list[aiokafka.AIOKafkaProducer]
) -> None:
    skip(made[0], settings, TOPIC, KEY)
    refused, stored = await asyncio.gather(publish(publisher, KEY), publish(publisher, OTHER), return_exceptions=True)
    assert isinstance(refused, UnavailableError)
    assert "OutOfOrderSequenceNumber" in str(refused)
    assert stored is None, "another partition is not concerned"
    await asyncio.gather(*(publish(publisher, key) for key in (KEY, OTHER, *KEYS.values())))
    assert [producer._closed for producer in made] == [True, False]


async def test_a_client_goes_on_after_the_broker_has_refused_a_sequence(
    settings: Settings, made: list[aiokafka.AIOKafkaProducer]
) -> None:
    tenant = TenantId(uuid7(1))
    caller = Caller(tenant, tenant)
    records = FileRecords(path="a.csv", format="csv")
    request = JobRequested(left=records, right=records, rules=MatchRules())
    transport = KafkaTransport(settings)
    await transport.start()
    try:
        await transport.submit(caller, JobId(uuid7(1)), request)
        skip(made[0], settings, "job-requests", tenant)
        with pytest.raises(UnavailableError, match="OutOfOrderSequenceNumber"):
            await transport.submit(caller, JobId(uuid7(2)), request)
        await transport.submit(caller, JobId(uuid7(2)), request)
    finally:
        await transport.stop()
    assert [producer._closed for producer in made] == [True, True]


async def test_a_publisher_goes_on_after_a_batch_was_given_up_unsent(
    publisher: EventPublisher, made: list[aiokafka.AIOKafkaProducer]
) -> None:
    expired = mock.patch.object(MessageBatch, "expired", return_value=True)
    with leaderless(made[0]), expired, pytest.raises(UnavailableError, match="NotLeaderForPartition"):
        await publish(publisher, KEY)
    await publish(publisher, KEY)


async def test_a_publisher_goes_on_after_a_batch_was_given_up_that_nobody_waited_for_any_more(
    publisher: EventPublisher, made: list[aiokafka.AIOKafkaProducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaderless(made[0]):
        with monkeypatch.context() as short, pytest.raises(UnavailableError, match="TimeoutError"):
            short.setattr(publisher_module, "PUBLISH_DEADLINE_S", 0.1)
            await publish(publisher, KEY)
        assert len(made) == 1, "it may still be stored, and others need the producer"
        with mock.patch.object(MessageBatch, "expired", return_value=True):
            await made[0].flush()
    await publish(publisher, KEY)


async def test_a_publisher_that_finds_no_kafka_for_a_new_producer_tries_again(
    publisher: EventPublisher, settings: Settings, made: list[aiokafka.AIOKafkaProducer]
) -> None:
    skip(made[0], settings, TOPIC, KEY)
    with mock.patch.object(aiokafka.AIOKafkaProducer, "start", side_effect=KafkaConnectionError("away")):
        for reason in ("OutOfOrderSequenceNumber", "away", "away"):
            with pytest.raises(UnavailableError, match=reason):
                await publish(publisher, KEY)
    await publish(publisher, KEY)


async def test_a_publisher_that_stops_while_its_producer_is_replaced_leaves_none(
    publisher: EventPublisher, settings: Settings, made: list[aiokafka.AIOKafkaProducer]
) -> None:
    start, begun, go = aiokafka.AIOKafkaProducer.start, asyncio.Event(), asyncio.Event()

    async def held(self: aiokafka.AIOKafkaProducer) -> None:
        begun.set()
        await go.wait()
        await start(self)

    skip(made[0], settings, TOPIC, KEY)
    with pytest.raises(UnavailableError):
        await publish(publisher, KEY)
    with mock.patch.object(aiokafka.AIOKafkaProducer, "start", held):
        publishing = [asyncio.create_task(publish(publisher, key)) for key in (KEY, OTHER)]
        async with asyncio.timeout(60):
            await begun.wait()
        stopping = asyncio.create_task(publisher.stop())
        go.set()
        told = await asyncio.gather(*publishing, return_exceptions=True)
        await stopping
    assert all(each is None or isinstance(each, UnavailableError) for each in told)
    assert [producer._closed for producer in made] == [True, True]
