"""A feed: every committed event of one topic, in all partitions, handed to a callback while the feed lives.

Delivery is at least once and in order within a partition: after a failure the feed reads on from the last position it
had handed over. It answers two questions about itself: is it caught up, and since when has it not heard of the broker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

import aiokafka
import structlog
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster, heed_cancellation
from settler_streams.errors import RecordError, UnavailableError
from settler_streams.events import Envelope, Part, decode
from settler_streams.services.background import in_background
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name, load_topology

log = structlog.get_logger(__name__)

START_DEADLINE_S = 30.0
"""Longest wait for something to come while a feed first catches up; 100,000 events take about 2 s."""
POLL_MS = 500
"""Longest wait of one poll; events are handed over as they come."""
PROBE_INTERVAL_S = 2.0
"""A feed that hears nothing asks the broker this often, because silence does not tell an idle topic from a lost one."""
PROBE_DEADLINE_S = 3.0
"""A broker that does not answer a probe by then counts as lost."""
STALE_AFTER_S = 6.0
"""A feed that has not heard of the broker for so long is stale: one probe and its deadline, and a second's slack."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 5.0
"""Pauses between attempts to reconnect, doubling; a feed is given up only when its process stops."""

OnEvent = Callable[[Envelope[Part]], None]


class TopicFeed:
    """Follows ``topic`` (declared name) from its beginning, or from its end at the time of :meth:`start`."""

    def __init__(
        self,
        settings: Settings,
        topic: str,
        on_event: OnEvent,
        *,
        start: Literal["beginning", "end"],
        topology: Topology | None = None,
    ) -> None:
        topology = topology or load_topology()
        self.topic = topic
        self._settings = settings
        self._on_event = on_event
        self._from = start
        self._tps = [
            TopicPartition(full_name(settings.deployment, topic), number)
            for number in range(topology.partitions(topic))
        ]
        self._positions: dict[TopicPartition, int] = {}
        self._caught_up = asyncio.Event()
        self._heard_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; returns once everything published before this call has been handed over (or passed, from the end).

        Raises:
            UnavailableError: nothing has come for :data:`START_DEADLINE_S`, and the feed has not caught up.
        """
        self._task = in_background(self._run(), f"feed of {self.topic}")
        caught_up = asyncio.create_task(self._caught_up.wait())
        reached, before = 0, -1
        while reached != before:  # a topic that is kept for ever takes longer each year; one that stands still, no more
            before = reached
            await asyncio.wait([self._task, caught_up], timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            if caught_up.done():
                return
            if self._task.done():
                break
            reached = sum(self._positions.values())
        caught_up.cancel()
        if self._task.done():
            await self._task  # raises what ended it
        await self.stop()
        raise UnavailableError(f"the feed of {self.topic} has stood still for {START_DEADLINE_S:.0f} s")

    async def stop(self) -> None:
        """End the feed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def stale(self) -> bool:
        """Whether the feed may miss what has happened since :data:`STALE_AFTER_S`."""
        ended = self._task is None or self._task.done()
        return ended or not self._caught_up.is_set() or time.monotonic() - self._heard_s > STALE_AFTER_S

    async def _run(self) -> None:
        pause_s = RECONNECT_MIN_S
        while True:
            began_s = time.monotonic()
            try:
                await self._follow()
            except (KafkaError, TimeoutError, OSError) as error:
                heed_cancellation()  # the consumer was closed on the way here
                log.warning("feed lost", topic=self.topic, error=repr(error))
            if time.monotonic() - began_s > RECONNECT_MAX_S:
                pause_s = RECONNECT_MIN_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    async def _follow(self) -> None:
        consumer = Cluster.of(self._settings).consumer(
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a topic that was deleted and made again is read anew
            fetch_max_wait_ms=POLL_MS,
            request_timeout_ms=int(START_DEADLINE_S * 1000),
        )
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                await consumer.start()
                consumer.assign(self._tps)
                ends = await self._seek(consumer)
            while True:
                heard = await self._poll(consumer)
                if not self._caught_up.is_set() and self._has_reached(ends):
                    self._caught_up.set()
                if not heard and time.monotonic() - self._heard_s > PROBE_INTERVAL_S:
                    async with asyncio.timeout(PROBE_DEADLINE_S):
                        await consumer.end_offsets(self._tps)
                    self._heard_s = time.monotonic()
        finally:
            await consumer.stop()

    async def _seek(self, consumer: aiokafka.AIOKafkaConsumer) -> dict[TopicPartition, int]:
        """Go to where the feed left off, or to its start; returns the ends it has to reach to be caught up."""
        ends: dict[TopicPartition, int] = await consumer.end_offsets(self._tps)
        if not self._positions:
            first = ends if self._from == "end" else await consumer.beginning_offsets(self._tps)
            self._positions = dict(first)
        for tp, offset in self._positions.items():
            consumer.seek(tp, offset)
        self._heard_s = time.monotonic()
        return ends

    async def _poll(self, consumer: aiokafka.AIOKafkaConsumer) -> bool:
        batches: dict[TopicPartition, list[Any]] = await consumer.getmany(*self._tps, timeout_ms=POLL_MS)
        for tp, records in batches.items():
            for record in records:
                self._hand_over(record)
                self._positions[tp] = record.offset + 1
        if not self._caught_up.is_set():
            # The consumer's own position also passes the markers of transactions, which are no records.
            for tp in self._tps:
                self._positions[tp] = max(self._positions[tp], await consumer.position(tp))
        if batches:
            self._heard_s = time.monotonic()
        return bool(batches)

    def _hand_over(self, record: Any) -> None:
        if record.value is None:
            return  # a tombstone: the key has been compacted away
        try:
            event = decode(record.value)
        except RecordError as error:
            # Whoever folds this topic puts it among the dead letters; a feed only has to go on.
            log.error("record passed over", topic=self.topic, offset=record.offset, reason=error.reason)  # noqa: TRY400
            return
        self._on_event(event)

    def _has_reached(self, ends: dict[TopicPartition, int]) -> bool:
        return all(self._positions[tp] >= end for tp, end in ends.items())
