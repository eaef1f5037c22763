"""Reads a job's request from where it lies in Kafka: a dispatch carries the place, not a copy."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import RecordError, UnavailableError
from settler_streams.events import Envelope, JobRequested, Part, RecordRef, decode
from settler_streams.ids import JobId, TenantId
from settler_streams.settings import Settings
from settler_streams.topology import full_name

READ_DEADLINE_S = 30.0
"""Longest wait for one request; a broker that is up answers within milliseconds."""


class StoredRequest(NamedTuple):
    """A request, and the record that it was read from."""

    body: JobRequested
    record: ConsumerRecord[bytes, bytes]


class RequestReader:
    """One consumer without a group, moved to the record that is wanted. Reads one request at a time."""

    def __init__(self, settings: Settings) -> None:
        self._deployment = settings.deployment
        self._consumer = Cluster.of(settings).consumer(
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=4 * 1024 * 1024,
        )
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Connect."""
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        await self._consumer.stop()

    async def read(self, tenant: TenantId, job_id: JobId, ref: RecordRef) -> StoredRequest:
        """The request of ``job_id``.

        Raises:
            RecordError: the record is gone, or is not this tenant's request for this job.
            UnavailableError: Kafka did not answer in time.
        """
        tp = TopicPartition(full_name(self._deployment, ref.topic), ref.partition)
        try:
            async with self._turn, asyncio.timeout(READ_DEADLINE_S):
                self._consumer.assign([tp])
                self._consumer.seek(tp, ref.offset)
                record = await self._consumer.getone(tp)
                # Or the client goes on to ask for the next record, and the broker takes the next job's question only
                # when it has answered that one: up to half a second later.
                self._consumer.pause(tp)
        except OffsetOutOfRangeError as error:
            raise RecordError("request-gone", f"{tp.topic}-{tp.partition}@{ref.offset} is not in the log") from error
        except (KafkaError, TimeoutError) as error:
            raise UnavailableError(f"request of job {job_id} could not be read: {error!r}") from error
        if record.offset != ref.offset:
            raise RecordError("request-gone", f"{tp.topic}-{tp.partition}@{ref.offset} is no longer in the log")
        return StoredRequest(_checked(decode(record.value), tenant, job_id), record)


def _checked(event: Envelope[Part], tenant: TenantId, job_id: JobId) -> JobRequested:
    if event.id != job_id or event.tenantid != tenant or not isinstance(event.data, JobRequested):
        raise RecordError("request-mismatch", f"the record that job {job_id} points to is another one: {event.id}")
    return event.data
