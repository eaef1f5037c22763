"""Publishing from a service: events reach the broker under their root tenant's key, each in its declared partition."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiokafka
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.stopping import stop_producer
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import CONTENT_TYPE, Part, encode, envelope
from settler_streams.ids import PLATFORM, TenantId, partition_of, uuid7
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name, load_topology

PUBLISH_DEADLINE_S = 20.0
"""Longest wait for the broker's acknowledgement. Below the 60 s for which Postgres lets the outbox relay's transaction
idle; beyond it the outcome is unknown."""
GLOBAL_KEY = "*"
"""Key of what concerns every tenant."""
ENVELOPE_BYTES_MAX = 4096
"""Room for attributes and headers beside the largest body."""

_HEADERS = [("content-type", CONTENT_TYPE.encode())]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded event on its way to ``topic`` (declared name) under ``key``."""

    topic: str
    key: str
    value: bytes


class EventPublisher:
    """One idempotent producer. What it acknowledges is stored; a retry inside it repeats nothing."""

    def __init__(self, settings: Settings, *, source: str, topology: Topology | None = None) -> None:
        self.source = source
        self._settings = settings
        self._topology = topology or load_topology()
        self._producer: aiokafka.AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: Kafka did not answer in time.
        """
        largest = max(topic.max_message_bytes for topic in self._topology.topics)
        producer = Cluster.of(self._settings).producer(
            enable_idempotence=True,
            acks="all",
            linger_ms=2,
            max_request_size=largest + ENVELOPE_BYTES_MAX,
        )
        try:
            async with asyncio.timeout(PUBLISH_DEADLINE_S):
                await producer.start()
        except (KafkaError, TimeoutError, OSError) as error:
            await stop_producer(producer)
            raise UnavailableError(f"Kafka did not answer: {error!r}") from error
        self._producer = producer

    async def stop(self) -> None:
        """Deliver what was accepted, then disconnect; see :func:`stop_producer`, which is bounded and does not raise.

        What Kafka does not acknowledge is no longer waited for. Its publisher is told that the outcome is unknown, and
        what came from the outbox is still there.
        """
        if self._producer is None:
            return
        producer, self._producer = self._producer, None
        await stop_producer(producer)

    async def publish(
        self, topic: str, tenant: TenantId, root: TenantId, data: Part, *, event_id: str | None = None
    ) -> str:
        """Publish one event about ``tenant``; returns its id once the broker has stored it.

        Raises:
            InvalidRequestError: the event is larger than its topic takes.
            UnavailableError: it is unknown whether it was stored; the same ``event_id`` may be published again.
        """
        event_id = event_id or uuid7(time.time_ns() // 1_000_000)
        now = dt.datetime.now(dt.UTC)
        event = envelope(data, event_id=event_id, source=self.source, tenant=tenant, time=now, subject=event_id)
        key = GLOBAL_KEY if tenant == PLATFORM else root
        value = encode(event)
        limit = self._topology.topic(topic).max_message_bytes
        if len(value) > limit:
            raise InvalidRequestError(f"the event has {len(value)} bytes, {topic} takes {limit}; use files")
        await self.publish_encoded([Encoded(topic, key, value)])
        return event_id

    async def publish_encoded(self, events: Sequence[Encoded]) -> None:
        """Publish events in their order per partition; returns once the broker has stored all of them.

        Raises:
            InvalidRequestError: the broker refuses one as too large.
            UnavailableError: it is unknown which were stored.
        """
        if self._producer is None:
            raise UnavailableError("the publisher is not started")
        try:
            async with asyncio.timeout(PUBLISH_DEADLINE_S):
                sent = [
                    await self._producer.send(
                        full_name(self._settings.deployment, event.topic),
                        event.value,
                        key=event.key.encode(),
                        partition=partition_of(event.key, self._topology.partitions(event.topic)),
                        headers=_HEADERS,
                    )
                    for event in events
                ]
                await asyncio.gather(*sent)
        except MessageSizeTooLargeError as error:
            raise InvalidRequestError(f"the broker refused the event: {error}") from error
        except (KafkaError, TimeoutError) as error:
            raise UnavailableError(f"it is unknown whether the event was stored: {error!r}") from error
