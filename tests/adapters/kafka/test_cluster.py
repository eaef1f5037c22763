"""Administrative clients of a cluster that is not itself."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import CoordinationType
from aiokafka.errors import KafkaConnectionError, NodeNotReadyError

from settler_streams.adapters.kafka import cluster
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import UnavailableError
from tests.chaos.proxy import Proxy, Weather
from tests.services.kafka_network import kafka_network


class Unnamed(AIOKafkaAdminClient):
    """A client that starts while the cluster names no broker, as often as ``left`` says."""

    left = 0
    closed = 0

    async def describe_cluster(self) -> Any:
        if Unnamed.left:
            Unnamed.left -= 1
            raise NodeNotReadyError("node id None")
        return await super().describe_cluster()

    async def close(self) -> None:
        Unnamed.closed += 1
        await super().close()


@pytest.fixture
def unnamed(monkeypatch):
    Unnamed.left = Unnamed.closed = 0
    monkeypatch.setattr(cluster, "AIOKafkaAdminClient", Unnamed)
    monkeypatch.setattr(cluster, "NAMED_RETRY_S", 0.01)
    return Unnamed


async def test_an_administrative_client_waits_until_the_cluster_names_a_broker(unnamed, services, kafka):
    unnamed.left = 2
    async with Cluster.of(services.settings).admin() as client:
        assert (await client.describe_cluster())["brokers"]
    assert (unnamed.left, unnamed.closed) == (0, 3), "each client is closed"


async def test_it_does_not_wait_for_ever(unnamed, monkeypatch, services, kafka):
    unnamed.left = 10_000
    monkeypatch.setattr(cluster, "ADMIN_DEADLINE_S", 3.0)  # two tries at least, on any machine
    with pytest.raises(UnavailableError, match="did not answer"):
        async with Cluster.of(services.settings).admin():
            pass
    assert unnamed.closed >= 10_000 - unnamed.left > 1


async def _closed(network: Proxy, _client: AIOKafkaAdminClient) -> str:
    network.cut_when(lambda _number, _piece, from_client: from_client)
    return "KafkaConnectionError"


async def _refused(network: Proxy, client: AIOKafkaAdminClient) -> str:
    network.set(Weather(refuses=True))
    await _closed(network, client)
    with pytest.raises(KafkaConnectionError):
        await client.list_topics()
    return "NodeNotReadyError"


async def _silent(network: Proxy, _client: AIOKafkaAdminClient) -> str:
    network.set(Weather(silent=True))
    return "RequestTimedOutError"


@pytest.mark.parametrize("goes_away", [_closed, _refused, _silent])
async def test_a_broker_that_goes_away_when_the_client_has_started_is_unavailable(
    goes_away, monkeypatch, services, kafka
):
    monkeypatch.setattr(cluster, "ADMIN_DEADLINE_S", 5.0)
    settings = services.settings
    async with kafka_network(settings.kafka_bootstrap_servers) as network:
        with pytest.raises(UnavailableError, match="did not answer") as refused:
            async with Cluster.of(settings).admin() as client:
                said = await goes_away(network, client)
                await client.list_topics()
    assert type(refused.value.__cause__).__name__ == said


async def test_a_cancellation_that_a_client_swallows_at_its_close_is_not_lost(unnamed, monkeypatch, services, kafka):
    async def swallowing(self: AIOKafkaAdminClient) -> None:
        await close(self)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)

    async def enter() -> None:
        async with Cluster.of(services.settings).admin():
            pass

    close = Unnamed.close
    monkeypatch.setattr(Unnamed, "close", swallowing)
    unnamed.left = 10_000
    task = asyncio.create_task(enter())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert unnamed.left == 9_999, "it does not try again"


async def test_who_looks_for_a_coordinator_that_no_broker_can_name_is_told_to_look_again(services, kafka):
    cluster = Cluster.of(services.settings)
    producer, consumer = cluster.producer(transactional_id="nobody"), cluster.consumer()
    for client in (producer.client, consumer._client):
        with pytest.raises(NodeNotReadyError, match="names no broker") as refused:
            await client.coordinator_lookup(CoordinationType.TRANSACTION, "nobody")
        assert refused.value.retriable, "aiokafka repeats what is retriable"
    await producer.start()
    await producer.stop()
    await consumer.stop()
