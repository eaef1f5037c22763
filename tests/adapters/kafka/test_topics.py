"""The broker's topics are made to be as declared, the ones that exist as well."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.errors import InvalidConfigurationError

from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.broker import Difference
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.topology import Declared, load_topology
from tests.runtime.kafka_log import WAIT_S_MAX

pytestmark = pytest.mark.services


@pytest.fixture
def changelog(deployment):
    """Of the flags, as declared."""
    return next(d for d in load_topology().declared(deployment) if d.topic.endswith(".flags-changelog"))


async def test_a_changelog_of_before_gets_what_keeps_it_short_and_keeps_what_else_was_set(services, kafka, changelog):
    kept_short = {"segment.bytes", "max.compaction.lag.ms", "delete.retention.ms"}
    before = {name: value for name, value in changelog.config.items() if name not in kept_short}
    before |= {"max.compaction.lag.ms": "86400000", "min.insync.replicas": "1", "min.compaction.lag.ms": "7"}
    async with Cluster.of(services.settings).admin() as client:
        await broker.apply(client, [changelog.model_copy(update={"config": before})])
        differences = [
            Difference(changelog.topic, "segment.bytes", "67108864", "1073741824", True),
            Difference(changelog.topic, "max.compaction.lag.ms", "3600000", "86400000", True),
        ]
        assert sorted(await broker.compare(client, [changelog]), key=lambda d: d.what, reverse=True) == differences
        assert sorted(await broker.apply(client, [changelog]), key=lambda d: d.what, reverse=True) == differences
        everything = Declared(topic=changelog.topic, partitions=changelog.partitions, config=before | changelog.config)
        await _until_as_declared(client, everything)


async def test_a_configuration_that_the_broker_refuses_is_an_error(services, kafka, changelog):
    async with Cluster.of(services.settings).admin() as client:
        await broker.apply(client, [changelog])
        refused = changelog.model_copy(update={"config": changelog.config | {"segment.bytes": "-1"}})
        with pytest.raises(InvalidConfigurationError, match="flags-changelog"):
            await broker.apply(client, [refused])


async def _until_as_declared(client, declared):
    """The controller's answer comes a moment before the broker goes by it."""
    async with asyncio.timeout(WAIT_S_MAX):
        while await broker.compare(client, [declared]):
            pass
