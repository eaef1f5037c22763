"""An input that was deleted and made again: the stored position means something else in it."""

from __future__ import annotations

import asyncio

import pytest

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import StateError
from settler_streams.runtime.session import Session
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.counter import arrived, fold, spec_of, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog

pytestmark = pytest.mark.services


async def test_an_input_that_was_made_again_stops_the_fold(settings: Settings) -> None:
    """It holds more than the old one did, so the position lies within it: the first records would be skipped."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    await log.append("usage-events", 0, [usage(tenant_in(0))])
    first = Session(spec_of(log), 0)
    await first.open()
    await fold(first, await arrived(log, first))
    await first.close()

    async with Cluster.of(settings).admin() as client:
        await client.delete_topics([log.full("usage-events")])
        async with asyncio.timeout(WAIT_S_MAX):
            while log.full("usage-events") in await client.list_topics():
                pass
    await log.create()
    await log.append("usage-events", 0, [usage(tenant_in(0))] * 3)

    second = Session(spec_of(log), 0)
    with pytest.raises(StateError, match="re-created"):
        await second.open()
