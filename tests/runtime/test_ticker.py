"""The ticker: when it ticks, and what it says when Kafka is not there. That it does, every test of an agent shows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import UnavailableError
from settler_streams.events import ClockTick
from settler_streams.runtime.ticker import Ticker
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.kafka_log import KafkaLog


async def test_a_ticker_that_cannot_reach_kafka_says_so() -> None:
    nobody_listens = Cluster("127.0.0.1:1", {"security_protocol": "PLAINTEXT"})
    with pytest.raises(UnavailableError, match="the ticker of admission could not start"):
        await Ticker("admission", "clock-ticks", nobody_listens, lambda: {0: 0}).run()


@pytest.mark.services
async def test_a_fold_that_has_not_committed_its_last_tick_gets_no_other(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    clocks = {0: 0, 1: 0}
    ticker = Ticker("counter", log.full("usage-events"), Cluster.of(settings), lambda: clocks)

    async def ticks_after_a_round() -> list[int]:
        await ticker._round(producer, [0, 1])
        ticks = [await log.read("usage-events", [partition]) for partition in clocks]
        clocks[1] = ticks[1][-1].timestamp  # this one does
        return [len(each) for each in ticks]

    async with log.producer() as producer:
        assert await ticks_after_a_round() == [1, 1]
        assert await ticks_after_a_round() == [1, 2]
        clocks[0] = (await log.read("usage-events", [0]))[-1].timestamp
        assert await ticks_after_a_round() == [2, 3]
        del clocks[0]  # it is another worker's now
        await ticker._round(producer, [0, 1])
        first, second = await log.events("usage-events", [0])
        assert [first.data, second.data] == [ClockTick(role="counter", sequence=sequence) for sequence in (1, 3)]
        assert first.source == second.source
        # Of a round that fails, one is known to be appended, and of the other it is unknown: that goes on as another.
        clocks[0], clocks[1] = 2**50, 2**50
        send = producer.send

        async def refused(topic: str, *content: bytes, partition: int) -> asyncio.Future[Any]:
            sent = await send(topic, *content, partition=partition)
            if partition == 0:
                return sent
            await sent
            failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            failed.set_exception(KafkaError("no leader"))
            return failed

        with monkeypatch.context() as patched:
            patched.setattr(producer, "send", refused)
            await ticker._round(producer, [0, 1])
        last = (await log.read("usage-events", [0]))[-1].timestamp
        assert ticker._appended_ms[0] == last
        await ticker._round(producer, [0, 1])
        sources = [[event.source for event in await log.events("usage-events", [partition])] for partition in (0, 1)]
        assert len(set(sources[0])) == 1
        assert len(set(sources[1][:-1])) == 1, "the tick that is unknown is the last of its source"
        assert sources[1][-1] not in {*sources[0], *sources[1][:-1]}
