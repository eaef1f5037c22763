"""A projection's session and step: records become rows in Postgres, in one transaction with the position behind them.

The position in Postgres is the truth; it is compared and set, so a second owner changes nothing and is fenced. Kafka's
committed offset is not used. A record that cannot be decoded, or whose row Postgres refuses, becomes a dead letter
before the transaction commits: a crash between the two may repeat a dead letter, and never loses one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiokafka
import structlog
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import dead_letter_form as deadletters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.topic_ids import topic_ids
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.projection import PositionMove, Refused, bisect, init_position, write_batch
from settler_streams.core.fold import Record
from settler_streams.errors import RecordError, StateError, UnavailableError
from settler_streams.runtime.intake import Intake, Raw, traceparent_of
from settler_streams.runtime.observation import Observation
from settler_streams.runtime.reader import InputReader, kafka_errors, new_consumer
from settler_streams.runtime.routing import key_of
from settler_streams.runtime.session import BATCH_BYTES
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.step import STEP_DEADLINE_S, Records
from settler_streams.topology import Projection, Topology, full_name

log = structlog.get_logger(__name__)

DEAD_LETTERS_S_MAX = 10.0
"""For all that a transaction waits for: PostgreSQL ends one that has been idle for 20 s (``postgres/roles.py``)."""
ENDS_SETTLE_S, ENDS_RETRY_S = 10.0, 0.1
"""A broker that has just started may say for a moment that less is committed than was read from it before."""


@dataclass(frozen=True, slots=True)
class ProjectionSpec:
    """What the sessions of one projection have in common."""

    declared: Projection
    topology: Topology
    cluster: Cluster
    deployment: str
    pool: TenantConnectionPool

    @property
    def consumer(self) -> str:
        """The name under which positions are stored."""
        return f"{self.deployment}.{self.declared.role}"

    def topic(self, name: str) -> str:
        """A declared topic's full name."""
        return full_name(self.deployment, name)


class ProjectionSession:
    """One ownership of one partition of a projection's inputs."""

    logic = None
    loaded = 0

    def __init__(self, spec: ProjectionSpec, partition: int) -> None:
        self.spec = spec
        self.partition = partition
        self.intake = Intake(spec.topology)
        self.now_ms = 0
        self.state = Overlay()
        self.taken = True  # a projection is not taken: whoever moves its position first has moved it
        self.positions: dict[TopicPartition, int] = {}
        self.topic_ids: dict[str, str] = {}
        self._consumer = new_consumer(spec.cluster, f"{spec.consumer}-{partition}")
        self._reader: InputReader
        self.producer: aiokafka.AIOKafkaProducer | None = None
        """For dead letters; None where the topology lets the role write none."""
        if spec.declared.role in spec.topology.topic("dead-letters").writers:
            self.producer = spec.cluster.producer(
                enable_idempotence=True, acks="all", linger_ms=0, max_batch_size=BATCH_BYTES,
                max_request_size=4 * 1024 * 1024,
            )  # fmt: skip

    async def open(self) -> None:
        """Read the positions from Postgres; store first ones for partitions that were never read.

        Raises:
            StateError: a topic was made again, or a position lies outside its log.
            UnavailableError: Kafka or Postgres did not answer in time.
        """
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await self._open()
        except (TimeoutError, KafkaError) as error:
            raise UnavailableError(f"{self.spec.consumer}-{self.partition} could not be opened: {error!r}") from error
        log.info("projection opened", projection=self.spec.consumer, partition=self.partition)

    async def _open(self) -> None:
        topics = [self.spec.topic(name) for name in self.spec.declared.inputs]
        tps = [TopicPartition(topic, self.partition) for topic in topics]
        if self.producer is not None:
            await self.producer.start()
        async with self.spec.cluster.admin() as client:
            self.topic_ids = await topic_ids(client, topics)
        await self._consumer.start()
        self._reader = InputReader(self.spec.declared.role, self._consumer, tps)
        beginnings, ends = await self._reader.bounds()
        positions = {
            tp: await init_position(
                self.spec.pool, self.spec.consumer, self.topic_ids[tp.topic], tp.topic, tp.partition, beginnings[tp]
            )
            for tp in tps
        }
        loop = asyncio.get_running_loop()
        patient_until_s = loop.time() + ENDS_SETTLE_S
        while any(positions[tp] > ends[tp] for tp in tps) and loop.time() < patient_until_s:
            await asyncio.sleep(ENDS_RETRY_S)
            beginnings, ends = await self._reader.bounds()
        for tp, position in positions.items():
            if not beginnings[tp] <= position <= ends[tp]:
                raise StateError(
                    f"{self.spec.consumer}: position {position} of {tp.topic}-{tp.partition} lies outside the log "
                    f"({beginnings[tp]} to {ends[tp]})"
                )
            self.positions[tp] = position
        self._reader.begin(self.positions)

    async def fetch(self, wait_s: float) -> Records:
        """The next records of the inputs; empty after ``wait_s`` seconds. What was handed out is not handed out again.

        Raises:
            UnavailableError: they cannot be read.
        """
        with kafka_errors(self.spec.consumer):
            return await self._reader.fetch(wait_s)

    async def backlog(self) -> tuple[list[int], bool]:
        """The offsets that are read next, and whether the broker, asked now, holds records there.

        Raises:
            UnavailableError: the broker did not answer.
        """
        with kafka_errors(self.spec.consumer):
            return await self._reader.backlog()

    def new_step(self, records: Records) -> ProjectionStep:
        """The step that projects ``records``."""
        return ProjectionStep(self, records)

    async def close(self) -> None:
        """Stop its clients. Bounded."""
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                ends = [self._consumer.stop()] + ([self.producer.stop()] if self.producer is not None else [])
                await asyncio.gather(*ends)
        except (TimeoutError, KafkaError) as error:
            log.warning("clients did not stop cleanly", projection=self.spec.consumer, error=repr(error))


class ProjectionStep:
    """The work on one batch: decode, collect effects, and on leaving write each partition's part in one transaction."""

    def __init__(self, session: ProjectionSession, records: Records) -> None:
        self._session = session
        self._records = records
        self._effects: dict[TopicPartition, list[Sequence[Effect]]] = {tp: [] for tp in records}
        self._observation = Observation(session.spec.declared.role, session.partition)
        self._refused: list[tuple[Raw, RecordError]] = []
        self._raw: Raw | None = None
        self._current: list[Sequence[Effect]] = []

    async def __aenter__(self) -> ProjectionStep:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        await self._dead_letters(self._refused)
        for tp, effects in self._effects.items():
            await self._write(tp, effects)
        self._observation.committed(sum(len(raws) for raws in self._records.values()))

    def decode(self) -> Iterator[Record]:
        """The batch's records in order; what cannot be decoded becomes a dead letter.

        The offset of one that was redriven is the first that it had: rows are ordered by it, and those of later records
        stand. Positions are by what lies in Kafka.
        """
        prefix = len(self._session.spec.deployment) + 1
        for tp, raws in self._records.items():
            self._current = self._effects[tp]
            topic = tp.topic[prefix:]
            for raw in raws:
                self._raw = raw
                try:
                    key, event = key_of(raw.key), self._session.intake.event_of(topic, raw)
                except RecordError as error:
                    self._refuse(error)
                    self._current.append(())
                    continue
                offset = deadletters.first_offset(dict(raw.headers or ()), raw.offset)
                yield Record(topic, tp.partition, offset, key, event, traceparent_of(raw))

    @property
    def raw(self) -> Raw:
        """The record in hand, as it lies in Kafka."""
        return self._raw

    def project(self, effects_of: Callable[[Record], Sequence[Effect]], record: Record) -> Sequence[Effect]:
        """Ask for a record's rows; one that cannot be projected becomes a dead letter and has none."""
        try:
            return effects_of(record)
        except RecordError as error:
            self._refuse(error)
            return ()

    def write(self, effects: Sequence[Effect]) -> None:
        """The rows that the record in hand leads to; written together or not at all."""
        self._current.append(effects)

    def raws(self) -> Iterator[Raw]:
        """The records as they lie in Kafka, for projections of records that are not events."""
        for tp, raws in self._records.items():
            self._current = self._effects[tp]
            yield from raws

    def _refuse(self, error: RecordError) -> None:
        self._refused.append((self._raw, error))

    async def _write(self, tp: TopicPartition, effects: list[Sequence[Effect]]) -> None:
        session, raws = self._session, self._records[tp]
        move = PositionMove(
            consumer=session.spec.consumer,
            topic_id=session.topic_ids[tp.topic],
            topic=tp.topic,
            partition=tp.partition,
            old_next_offset=session.positions[tp],
            new_next_offset=raws[-1].offset + 1,
        )
        try:
            await write_batch(session.spec.pool, move, effects)
        except RecordError:

            async def dead_letter(refused: Sequence[Refused]) -> None:
                await self._dead_letters([(raws[row.index], row.error) for row in refused])

            await bisect(session.spec.pool, move, effects, dead_letter)
        session.positions[tp] = move.new_next_offset

    async def _dead_letters(self, refused: Sequence[tuple[Raw, RecordError]]) -> None:
        """Store them all, or fail before PostgreSQL gives up the transaction that waits for them."""
        if not refused:
            return
        spec = self._session.spec
        producer = self._session.producer
        if producer is None:  # a dead letter about a dead letter would come back to the same projection, for ever
            raw, error = refused[0]
            raise StateError(f"{spec.consumer} cannot project {raw.topic}-{raw.partition}@{raw.offset}: {error}")
        sent: list[asyncio.Future[Any]] = []
        try:
            async with asyncio.timeout(DEAD_LETTERS_S_MAX):
                for raw, error in refused:
                    self._observation.dead_letter(error.reason)
                    partition = raw.partition % spec.topology.partitions("dead-letters")
                    letter = deadletters.letter(raw, spec.declared.role, error, raw.timestamp)
                    # Answered one by one, those of a large batch would never be done in time. It waits for room.
                    answer = await producer.send(
                        spec.topic("dead-letters"), letter.value, key=letter.key, partition=partition,
                        headers=letter.headers,
                    )  # fmt: skip
                    sent.append(answer)
                await asyncio.gather(*sent)
        except (KafkaError, TimeoutError) as failure:
            raise UnavailableError(f"dead letters could not be stored: {failure!r}") from failure
