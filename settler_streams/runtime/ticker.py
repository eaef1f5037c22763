"""Time as records: the owner of a fold appends a clock tick to the fold's input every second.

A fold's ``now`` moves only with the records it reads. The tick moves it while nothing else arrives, so that windows
close, leases expire and delays end on idle partitions too, and at the same point of the log in every replay.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import aiokafka
import structlog
from aiokafka.errors import KafkaError

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import UnavailableError
from settler_streams.events import ClockTick, encode, envelope
from settler_streams.ids import PLATFORM, uuid7

if TYPE_CHECKING:
    from aiokafka.structs import RecordMetadata

log = structlog.get_logger(__name__)

TICK_INTERVAL_S = 1.0
TICK_DEADLINE_S = 10.0
"""A tick that the broker has not taken by then is given up: the next one says more."""


class Ticker:
    """Appends ticks for the folds that ``clocks`` names at that moment, each with its ``now``.

    Its own clock only paces it: a fold has its next tick once it has committed the last one. So the second tick of one
    source behind a record, which has a greater number than the first, was appended after that record's step had been
    committed, however far the fold lags behind its log. After a tick of which it is unknown whether it was appended,
    the fold has ticks of another source.

    At least once: a tick whose answer is lost is sent again, and can be in the log twice under one id.
    """

    def __init__(self, role: str, topic: str, cluster: Cluster, clocks: Callable[[], Mapping[int, int]]) -> None:
        self._role = role
        self._topic = topic
        self._cluster = cluster
        self._clocks = clocks
        self._sequence = 0
        self._appended_ms: dict[int, int] = {}
        self._sources: dict[int, str] = {}

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            UnavailableError: Kafka did not answer at the start.
        """
        producer = self._cluster.producer(client_id=f"{self._role}-ticker", linger_ms=0, acks="all")
        try:
            try:
                await producer.start()
            except KafkaError as error:
                raise UnavailableError(f"the ticker of {self._role} could not start: {error!r}") from error
            while True:
                if folds := list(self._clocks()):
                    await self._round(producer, folds)
                else:
                    await asyncio.sleep(TICK_INTERVAL_S)
        finally:
            await producer.stop()

    async def _round(self, producer: aiokafka.AIOKafkaProducer, folds: Sequence[int]) -> None:
        """One tick for each fold, spread over the interval: all at once would be a wave of steps each second, and
        whatever arrives in it would wait for its end."""
        self._sequence += 1
        sent: dict[int, asyncio.Future[RecordMetadata]] = {}
        try:
            async with asyncio.timeout(TICK_INTERVAL_S + TICK_DEADLINE_S):
                for partition in folds:
                    if self._clocks().get(partition, -1) >= self._appended_ms.get(partition, 0):
                        sent[partition] = await producer.send(
                            self._topic, self._encoded(partition), partition=partition
                        )
                    await asyncio.sleep(TICK_INTERVAL_S / len(folds))
                await asyncio.gather(*sent.values())
        except (KafkaError, TimeoutError) as error:
            log.warning("tick not appended", topic=self._topic, error=repr(error))
        for partition, tick in sent.items():
            if tick.done() and not tick.cancelled() and tick.exception() is None:
                self._appended_ms[partition] = tick.result().timestamp
            else:
                del self._sources[partition]

    def _encoded(self, partition: int) -> bytes:
        now = dt.datetime.now(dt.UTC)
        tick = ClockTick(role=self._role, sequence=self._sequence)
        now_ms = int(now.timestamp() * 1000)
        source = self._sources.setdefault(partition, f"/ticker/{self._role}/{uuid7(now_ms)}")
        return encode(envelope(tick, event_id=uuid7(now_ms), source=source, tenant=PLATFORM, time=now))
