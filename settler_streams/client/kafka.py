"""The Kafka transport, for trusted services: publishes events as the schemas say, and follows the committed log."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

import aiokafka
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.event_producer import EventProducer, Outgoing
from settler_streams.client.answers import Answers
from settler_streams.client.transport import Caller, Command, Start, answers_since, check_job_id
from settler_streams.errors import InvalidRequestError, StateError, UnavailableError
from settler_streams.events import (
    Envelope,
    FlagCommand,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobRequested,
    Part,
    UsageRecorded,
    decode,
    encode,
    envelope,
)
from settler_streams.ids import PLATFORM, JobId, partition_of, uuid7
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name, load_topology

SEND_DEADLINE_S = 30.0
"""Longest wait for the broker to store an event; beyond it the outcome is unknown."""
LOOK_UP_AFTER_S = 5.0
"""An answer that the reader has not met by then may lie behind it: the job was submitted once before."""
GLOBAL_KEY = "*"

_TOPIC_OF: dict[type[Part], str] = {
    JobRequested: "job-requests",
    JobCancelRequested: "job-requests",
    UsageRecorded: "usage-events",
    FlagCommand: "flag-commands",
}
_ANSWER_TOPICS: dict[type[Part], str] = {JobDecided: "job-decisions", JobFinished: "job-results"}

B = TypeVar("B", JobDecided, JobFinished)


class KafkaTransport:
    """Publishes with an idempotent producer; one reader follows decisions and results for every waiting job."""

    def __init__(self, settings: Settings, *, source: str = "/sdk", topology: Topology | None = None) -> None:
        self._settings = settings
        self._source = source
        self._topology = topology or load_topology()
        self._turn = asyncio.Lock()
        self._users = 0
        self._producer: EventProducer | None = None
        self._reader: asyncio.Task[None] | None = None
        self._decisions: Answers[JobDecided] = Answers()
        self._results: Answers[JobFinished] = Answers()

    async def start(self) -> None:
        """Connect; a second start of a shared transport only counts its users.

        Raises:
            UnavailableError: Kafka did not answer; it may be started again.
        """
        async with self._turn:
            if self._users == 0:
                await self._connect()
            self._users += 1

    async def _connect(self) -> None:
        largest = self._topology.topic("job-requests").max_message_bytes + 4096
        self._producer = EventProducer(Cluster.of(self._settings), max_request_size=largest)
        consumer = self._new_consumer()
        try:
            async with asyncio.timeout(SEND_DEADLINE_S):
                await self._producer.start()
                await consumer.start()
                tps = [tp for topic in ("job-decisions", "job-results") for tp in self._partitions(topic)]
                consumer.assign(tps)
                await consumer.seek_to_end(*tps)
                await asyncio.gather(*(consumer.position(tp) for tp in tps))
        except BaseException as error:
            ends = [asyncio.create_task(self._producer.stop()), asyncio.create_task(consumer.stop())]
            await asyncio.wait(ends, timeout=SEND_DEADLINE_S)
            self._producer = None
            if isinstance(error, KafkaError | TimeoutError):
                servers = self._settings.kafka_bootstrap_servers
                raise UnavailableError(f"Kafka at {servers} did not answer: {error!r}") from error
            raise
        self._reader = asyncio.create_task(self._follow(consumer))

    async def stop(self) -> None:
        """Deliver what was accepted and disconnect, when the last user stops. Bounded, also while Kafka is silent."""
        async with self._turn:
            self._users -= 1
            if self._users == 0:
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._producer is None:
            return
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        await self._producer.stop()

    async def submit(self, caller: Caller, job_id: JobId, request: JobRequested) -> None:
        """See :meth:`Transport.submit`."""
        check_job_id(job_id)
        self._check_reader()
        self._decisions.expect(caller.tenant, job_id)
        self._results.expect(caller.tenant, job_id)
        await self._publish(caller, request, job_id)

    async def send(self, caller: Caller, command: Command) -> None:
        """See :meth:`Transport.send`."""
        await self._publish(caller, command, uuid7(time.time_ns() // 1_000_000))

    async def decision(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobDecided:
        """See :meth:`Transport.decision`."""
        return await self._answer(self._decisions, caller, job_id, timeout_s, JobDecided)

    async def result(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobFinished:
        """See :meth:`Transport.result`."""
        return await self._answer(self._results, caller, job_id, timeout_s, JobFinished)

    async def results(self, caller: Caller, start: Start) -> AsyncIterator[JobFinished]:
        """See :meth:`Transport.results`."""
        async with contextlib.aclosing(self._read(caller, "job-results", start)) as bodies:
            async for body in bodies:
                if isinstance(body, JobFinished):
                    yield body

    async def _publish(self, caller: Caller, data: Part, event_id: str) -> None:
        assert self._producer is not None, "the transport is not started"  # noqa: S101
        key = GLOBAL_KEY if caller.tenant == PLATFORM else caller.root
        now = dt.datetime.now(dt.UTC)
        event = envelope(data, event_id=event_id, source=self._source, tenant=caller.tenant, time=now, subject=event_id)
        name = _TOPIC_OF[type(data)]
        value = encode(event)
        limit = self._topology.topic(name).max_message_bytes
        if len(value) > limit:
            raise InvalidRequestError(f"the event has {len(value)} bytes, {name} takes {limit}; use files")
        partition = partition_of(key, self._topology.partitions(name))
        topic = full_name(self._settings.deployment, name)
        try:
            async with asyncio.timeout(SEND_DEADLINE_S):
                await self._producer.publish([Outgoing(topic, partition, key, value)])
        except MessageSizeTooLargeError as error:
            raise InvalidRequestError(f"the broker refused {len(value)} bytes: {error}") from error
        except (KafkaError, TimeoutError, OSError) as error:
            raise UnavailableError(f"it is unknown whether the event was stored: {error!r}") from error

    async def _answer(self, answers: Answers[B], caller: Caller, job_id: JobId, timeout_s: float, wanted: type[B]) -> B:
        self._check_reader()
        try:
            async with asyncio.timeout(timeout_s):
                if (future := answers.find(caller.tenant, job_id)) is not None:
                    met, _ = await asyncio.wait([future], timeout=LOOK_UP_AFTER_S)
                    if met and (answer := future.result()) is not None:
                        return answer
                found = await self._look_up(caller, job_id, wanted)
                answers.settle(caller.tenant, job_id, found)
                return found
        except TimeoutError as error:
            raise UnavailableError(f"no answer about job {job_id} in {timeout_s:.1f} s") from error

    async def _look_up(self, caller: Caller, job_id: JobId, wanted: type[B]) -> B:
        """Find the answer of a job in the log, from the time in its id on; waits for one that is still to come."""
        since = answers_since(job_id)
        async with contextlib.aclosing(self._read(caller, _ANSWER_TOPICS[wanted], since)) as bodies:
            async for body in bodies:
                if isinstance(body, wanted) and body.job_id == job_id:
                    return body
        raise UnavailableError(f"the log of answers ended before one about job {job_id}")

    async def _read(self, caller: Caller, topic: str, start: Start) -> AsyncGenerator[Part, None]:
        """Bodies of the caller's own events in its partition of ``topic``, committed ones only."""
        count = self._topology.partitions(topic)
        tp = TopicPartition(full_name(self._settings.deployment, topic), partition_of(caller.root, count))
        consumer = self._new_consumer()
        await consumer.start()
        try:
            consumer.assign([tp])
            await self._seek(consumer, tp, start)
            async for record in consumer:
                event = decode(record.value)
                if event.tenantid == caller.tenant:
                    yield event.data
        finally:
            await consumer.stop()

    async def _seek(self, consumer: aiokafka.AIOKafkaConsumer, tp: TopicPartition, start: Start) -> None:
        # Before the look by time: a record that arrives after that look is not to be passed over.
        end = (await consumer.end_offsets([tp]))[tp]
        if start == "beginning":
            await consumer.seek_to_beginning(tp)
            await consumer.position(tp)
        elif isinstance(start, dt.datetime):
            found = (await consumer.offsets_for_times({tp: int(start.timestamp() * 1000)}))[tp]
            consumer.seek(tp, end if found is None else found.offset)
        else:
            consumer.seek(tp, end)

    async def _follow(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        """Resolve the waiting jobs as their decisions and results are committed."""
        try:
            async for record in consumer:
                self._resolve(decode(record.value))
        finally:
            await consumer.stop()

    def _resolve(self, event: Envelope[Part]) -> None:
        match body := event.data:
            case JobDecided():
                self._decisions.settle(event.tenantid, JobId(body.job_id), body)
                if not body.admitted:
                    self._results.forget(event.tenantid, JobId(body.job_id))
            case JobFinished():
                self._results.settle(event.tenantid, JobId(body.job_id), body)
            case _:
                raise StateError(f"{body.event_type} in a topic of answers")

    def _check_reader(self) -> None:
        if self._reader is not None and self._reader.done() and not self._reader.cancelled():
            raise UnavailableError(f"the reader of answers has stopped: {self._reader.exception()!r}")

    def _new_consumer(self) -> aiokafka.AIOKafkaConsumer:
        return Cluster.of(self._settings).consumer(
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # an offset that has expired goes on with the oldest that is kept
            fetch_max_wait_ms=100,
        )

    def _partitions(self, topic: str) -> list[TopicPartition]:
        name = full_name(self._settings.deployment, topic)
        return [TopicPartition(name, number) for number in range(self._topology.partitions(topic))]
