"""The in-memory broker against a real one: the same steps, the same observations."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.topology import Declared
from tests.simulation.broker import Broker
from tests.simulation.clients import SimulatedCluster
from tests.simulation.misfortunes import Faults
from tests.simulation.network import Network, Process
from tests.simulation.scenarios import MESSAGE_BYTES_MAX, SCENARIOS, Bench, Scenario
from tests.simulation.virtual_time import run

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services


@pytest.fixture(scope="module")
def settings(services: Services, kafka: Service) -> Settings:
    """The running broker."""
    return services.settings


async def really(play: Scenario, settings: Settings, topic: str) -> list[Any]:
    """Play the scenario on the real broker."""
    cluster = Cluster.of(settings)
    config = {"max.message.bytes": str(MESSAGE_BYTES_MAX), "message.timestamp.type": "LogAppendTime"}
    async with cluster.admin() as client:
        await apply(client, [Declared(topic=topic, partitions=2, config=config)])
    return await played(play, Bench(cluster, topic))


async def simulated(play: Scenario, topic: str) -> list[Any]:
    """Play it on the in-memory one, over a network without faults."""
    random = Random(0)  # noqa: S311 - repeatable on purpose
    network = Network(random, Faults(random, raging=False))
    broker = Broker(marker_delay_s=lambda: random.random() * 0.05)
    broker.create_topic(topic, 2, MESSAGE_BYTES_MAX)
    return await played(play, Bench(SimulatedCluster(broker, network, Process("test")), topic))


async def played(play: Scenario, bench: Bench) -> list[Any]:
    """The observations; the producers are stopped afterwards."""
    try:
        return await play(bench)
    finally:
        await bench.close()


@pytest.mark.services
@pytest.mark.parametrize("name", SCENARIOS)
def test_both_brokers_answer_alike(name: str, settings: Settings, deployment: str) -> None:
    play = SCENARIOS[name]
    topic = f"{deployment}.{list(SCENARIOS).index(name)}"
    real = asyncio.run(really(play, settings, topic))
    assert run(simulated(play, topic)) == real
