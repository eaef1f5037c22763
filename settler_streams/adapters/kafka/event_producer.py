"""An idempotent producer that goes on after one of its batches has failed.

aiokafka numbers a batch as it takes it up. One that then fails (refused for good, or given up unsent because its
partition had no leader) has used numbers that the broker never stored: it refuses every later batch of that producer to
that partition as out of order, and aiokafka never begins anew. A new producer has an id of its own and begins at 0.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import aiokafka
import structlog
from aiokafka.errors import ProducerClosed

from settler_streams.adapters.kafka.cluster import Cluster, heed_cancellation
from settler_streams.adapters.kafka.stopping import stop_producer
from settler_streams.events import CONTENT_TYPE

log = structlog.get_logger(__name__)

_HEADERS = [("content-type", CONTENT_TYPE.encode())]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An encoded event on its way to a partition of ``topic`` (full name)."""

    topic: str
    partition: int
    key: str
    value: bytes


class EventProducer:
    """One producer at a time. After a batch has failed it is stopped, and the next publishing begins with a new one.

    That no acknowledgement came in time is no such failure: the batch is still repeated, in its order, and other
    partitions need not suffer for it. Should it be given up later, that is noticed then.
    """

    def __init__(self, cluster: Cluster, *, max_request_size: int) -> None:
        self._cluster = cluster
        self._max_request_size = max_request_size
        self._turn = asyncio.Lock()
        self._closed = False
        self._producer: aiokafka.AIOKafkaProducer | None = None
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Connect. Neither an error nor a cancellation leaves anything behind."""
        async with self._turn:
            await self._usable()

    async def stop(self) -> None:
        """Deliver what was accepted, then disconnect; see :func:`stop_producer`. Takes no event from now on.

        Waits for a replacement under way, which ends by the deadline of the caller that needs it.
        """
        self._closed = True
        async with self._turn:
            await self._end()

    async def publish(self, events: Iterable[Outgoing]) -> None:
        """Publish events in their order per partition; returns once the broker has stored all of them.

        Waits without end: the deadline is the caller's. After an error, and after a cancellation, it is unknown which
        were stored.
        """
        async with self._turn:
            producer = await self._usable()
        # All of them with this one, also if it fails meanwhile: a new one would store what follows the failed event.
        sent = []
        for event in events:
            stored = await producer.send(
                event.topic, event.value, key=event.key.encode(), partition=event.partition, headers=_HEADERS
            )
            stored.add_done_callback(functools.partial(self._note, producer))
            sent.append(stored)
        # Shielded, as a batch may still fail when nobody waits for it any more.
        await asyncio.gather(*map(asyncio.shield, sent))

    async def _usable(self) -> aiokafka.AIOKafkaProducer:
        """The producer; a new one if there is none, or if it has failed."""
        if self._closed:
            raise ProducerClosed
        if self._failure is not None:
            log.warning("producer replaced, as a batch of it has failed", error=repr(self._failure))
            await self._end()
            heed_cancellation()  # or the caller's deadline, which the old client's close may have swallowed, is none
        if self._producer is None:
            producer = self._cluster.producer(
                enable_idempotence=True, acks="all", linger_ms=2, max_request_size=self._max_request_size
            )
            try:
                await producer.start()
            except BaseException:
                await stop_producer(producer)
                raise
            self._producer = producer
        return self._producer

    async def _end(self) -> None:
        """Stop the producer, before another begins: what it had accepted comes first, and there are never two."""
        producer, self._producer, self._failure = self._producer, None, None
        if producer is not None:
            await stop_producer(producer)

    def _note(self, producer: aiokafka.AIOKafkaProducer, stored: asyncio.Future[Any]) -> None:
        if not stored.cancelled() and stored.exception() is not None and producer is self._producer:
            self._failure = stored.exception()
