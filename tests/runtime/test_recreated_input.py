"""An input that was deleted and made again: the stored position means something else in it."""

from __future__ import annotations

import asyncio

import pytest

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import StateError, UnavailableError
from settler_streams.runtime.session import Session
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.counter import arrived, fold, spec_of, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog

pytestmark = pytest.mark.services


async def deleted(settings: Settings, topic: str) -> None:
    """Delete a topic, and wait until it is gone."""
    async with Cluster.of(settings).admin() as client:
        await client.delete_topics([topic])
        async with asyncio.timeout(WAIT_S_MAX):
            while topic in await client.list_topics():
                pass


async def test_an_input_that_was_made_again_stops_the_fold(settings: Settings) -> None:
    """It holds more than the old one did, so the position lies within it: the first records would be skipped."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    await log.append("usage-events", 0, [usage(tenant_in(0))])
    first = Session(spec_of(log), 0)
    await first.open()
    await fold(first, await arrived(log, first))
    await first.close()

    await deleted(settings, log.full("usage-events"))
    await log.create()
    await log.append("usage-events", 0, [usage(tenant_in(0))] * 3)

    second = Session(spec_of(log), 0)
    with pytest.raises(StateError, match="re-created"):
        await second.open()


async def test_a_fold_that_is_reading_notices_that_its_input_is_gone(settings: Settings) -> None:
    """Its client would ask again and again, and read on at the old position in whatever gets the name next."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    await log.append("usage-events", 1, [usage(tenant_in(1))])
    session = Session(spec_of(log), 1)
    await session.open()
    await fold(session, await arrived(log, session))
    await deleted(settings, log.full("usage-events"))
    with pytest.raises(UnavailableError, match="is gone"):
        async with asyncio.timeout(WAIT_S_MAX):
            while True:
                await session.fetch(0.2)
    await session.close()
