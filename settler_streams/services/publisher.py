"""Publishing from a service: events reach the broker under their root tenant's key, each in its declared partition."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.event_producer import EventProducer, Outgoing
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import Part, encode, envelope
from settler_streams.ids import PLATFORM, TenantId, partition_of, uuid7
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name, load_topology

PUBLISH_DEADLINE_S = 20.0
"""Longest wait for the broker's acknowledgement; beyond it the outcome is unknown. PostgreSQL ends the outbox relay's
transaction when it has been idle for as long: whichever comes first, the events stay in the outbox."""
GLOBAL_KEY = "*"
"""Key of what concerns every tenant."""
ENVELOPE_BYTES_MAX = 4096
"""Room for attributes and headers beside the largest body."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded event on its way to ``topic`` (declared name) under ``key``."""

    topic: str
    key: str
    value: bytes


class EventPublisher:
    """An idempotent producer. What it acknowledges is stored; a retry inside it repeats nothing.

    One event that Kafka refuses, or that found no leader for its partition, leaves the next ones a working publisher.
    """

    def __init__(self, settings: Settings, *, source: str, topology: Topology | None = None) -> None:
        self.source = source
        self._settings = settings
        self._topology = topology or load_topology()
        self._producer: EventProducer | None = None

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: Kafka did not answer in time.
        """
        largest = max(topic.max_message_bytes for topic in self._topology.topics)
        producer = EventProducer(Cluster.of(self._settings), max_request_size=largest + ENVELOPE_BYTES_MAX)
        try:
            async with asyncio.timeout(PUBLISH_DEADLINE_S):
                await producer.start()
        except (KafkaError, TimeoutError, OSError) as error:
            raise UnavailableError(f"Kafka did not answer: {error!r}") from error
        self._producer = producer

    async def stop(self) -> None:
        """Deliver what was accepted, then disconnect. Bounded, and raises nothing of Kafka's.

        What Kafka does not acknowledge is no longer waited for. Its publisher is told that the outcome is unknown, and
        what came from the outbox is still there.
        """
        if self._producer is None:
            return
        producer, self._producer = self._producer, None
        await producer.stop()

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
                await self._producer.publish(self._outgoing(event) for event in events)
        except MessageSizeTooLargeError as error:
            raise InvalidRequestError(f"the broker refused the event: {error}") from error
        except (KafkaError, TimeoutError, OSError) as error:
            raise UnavailableError(f"it is unknown whether the event was stored: {error!r}") from error

    def _outgoing(self, event: Encoded) -> Outgoing:
        partition = partition_of(event.key, self._topology.partitions(event.topic))
        return Outgoing(full_name(self._settings.deployment, event.topic), partition, event.key, event.value)
