"""What Kafka does not acknowledge keeps nobody from ending: no error is replaced, and neither task nor socket stays."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import Callable, Iterator

import aiokafka
import psutil
import pytest
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.errors import KafkaConnectionError

from settler_streams.adapters.kafka import stopping
from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.client import Caller, KafkaTransport
from settler_streams.client import kafka as transport_module
from settler_streams.errors import UnavailableError
from settler_streams.events import FileRecords, JobRequested, MatchRules
from settler_streams.ids import JobId, TenantId, partition_of, uuid7
from settler_streams.services import EventPublisher, TenantService, acknowledgements
from settler_streams.services import publisher as publisher_module
from settler_streams.services.feed import TopicFeed
from settler_streams.services.publisher import Encoded
from settler_streams.services.tenants import TenantNotYetKnownError
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from tests.services.interface import Service
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services

ENDS_WITHIN_S = 60
DEADLINE_S = 0.5
"""Instead of each deadline for what Kafka does not answer."""
TOPOLOGY = load_topology()
TOPIC = "usage-events"
LARGE = b"x" * 900_000
"""One of these for each partition is more than the system takes of a request whose receiver reads nothing."""


@pytest.fixture
def silence(kafka: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Freezes Kafka with its connections open, and shortens the deadlines; over when the test is."""

    def begin() -> None:
        monkeypatch.setattr(stopping, "DELIVERY_DEADLINE_S", DEADLINE_S)
        monkeypatch.setattr(publisher_module, "PUBLISH_DEADLINE_S", DEADLINE_S)
        monkeypatch.setattr(transport_module, "SEND_DEADLINE_S", DEADLINE_S)
        monkeypatch.setattr(acknowledgements, "ACKNOWLEDGED_WITHIN_S", DEADLINE_S)
        kafka.pause()

    yield begin
    kafka.resume()


@pytest.fixture
async def topics(new_settings: Settings) -> Settings:
    """A deployment in which nobody works."""
    async with Cluster.of(new_settings).admin() as client:
        await apply(client, TOPOLOGY.declared(new_settings.deployment))
    return new_settings


def sockets(settings: Settings) -> set[int]:
    """This process's connections to Kafka, by their own port."""
    port = urllib.parse.urlsplit(f"//{settings.kafka_bootstrap_servers}").port
    found = psutil.Process().net_connections(kind="tcp")
    return {each.laddr.port for each in found if each.raddr and each.raddr.port == port}


@pytest.mark.parametrize("value", [b"x", LARGE], ids=["sent", "more-than-the-socket-takes"])
async def test_a_publisher_ends_without_an_acknowledgement_and_leaves_nothing(
    topics: Settings, silence: Callable[[], None], value: bytes
) -> None:
    tasks, connections = asyncio.all_tasks(), sockets(topics)
    count = TOPOLOGY.partitions(TOPIC)
    keys = {partition_of(str(number), count): str(number) for number in range(100 * count)}
    publisher = EventPublisher(topics, source="/test")
    await publisher.start()
    await publisher.publish_encoded([Encoded(TOPIC, "first", b"x")])
    assert sockets(topics) > connections
    silence()
    with pytest.raises(UnavailableError, match="unknown whether"):
        await publisher.publish_encoded([Encoded(TOPIC, key, value) for key in keys.values()])
    async with asyncio.timeout(ENDS_WITHIN_S):
        await publisher.stop()
    assert asyncio.all_tasks() == tasks
    assert sockets(topics) == connections


async def test_a_client_ends_without_an_acknowledgement_and_leaves_nothing(
    topics: Settings, silence: Callable[[], None]
) -> None:
    tasks, connections = asyncio.all_tasks(), sockets(topics)
    tenant = TenantId(uuid7(1))
    caller = Caller(tenant, tenant)
    records = FileRecords(path="a.csv", format="csv")
    request = JobRequested(left=records, right=records, rules=MatchRules())
    transport = KafkaTransport(topics)
    await transport.start()
    await transport.submit(caller, JobId(uuid7(1)), request)
    silence()
    with pytest.raises(UnavailableError, match="unknown whether"):
        await transport.submit(caller, JobId(uuid7(2)), request)
    async with asyncio.timeout(ENDS_WITHIN_S):
        await transport.stop()
    assert asyncio.all_tasks() == tasks
    assert sockets(topics) == connections


async def test_a_feed_that_is_stopped_as_it_loses_kafka_ends(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer's close takes the cancellation for that of its own task, and the feed would connect anew."""
    feed, close = TopicFeed(topics, TOPIC, lambda _event: None, start="end"), Fetcher.close
    stopped: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    async def at_the_same_time(fetcher: Fetcher) -> None:
        if not stopped.done():
            stopped.set_result(asyncio.create_task(feed.stop()))
        await close(fetcher)

    async def lost(*_given: object, **_options: object) -> None:
        raise KafkaConnectionError("planted")

    await feed.start()
    monkeypatch.setattr(Fetcher, "close", at_the_same_time)
    monkeypatch.setattr(aiokafka.AIOKafkaConsumer, "getmany", lost)
    async with asyncio.timeout(ENDS_WITHIN_S):
        await (await stopped)


async def test_who_changes_a_tenant_hears_that_the_change_is_stored(
    platform: Platform, silence: Callable[[], None]
) -> None:
    tenant = (await platform.new_tenant()).tenant
    await platform.relay.stop()  # the service's own relay is the one that publishes
    try:
        async with asyncio.timeout(ENDS_WITHIN_S):
            with pytest.raises(TenantNotYetKnownError, match="is stored as version 3"):
                async with TenantService.connect(platform.settings) as service:
                    await service.rename(tenant.id, "told")
                    silence()
                    await service.rename(tenant.id, "untold")
    finally:
        await platform.relay.start()
