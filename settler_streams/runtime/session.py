"""A session: one fold's producer, positions and state, created together and dropped together.

State never outlives the producer's epoch. Opening a session fences every older owner of the same fold; after that the
old owner can commit nothing, whatever it still believes. Nothing re-creates a producer inside a session: a zombie that
did so would fence the rightful owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import aiokafka
import structlog
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.topic_ids import topic_ids
from settler_streams.core.fold import CLOCK_KEY, FoldClock, FoldLogic, State, value_of
from settler_streams.errors import StateError, UnavailableError
from settler_streams.runtime.intake import Intake, Raw
from settler_streams.runtime.routing import Router
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.runtime.step import STEP_DEADLINE_S, Records, Step
from settler_streams.topology import Fold, Topology, full_name

log = structlog.get_logger(__name__)

TRANSACTION_TIMEOUT_MS = 10_000
"""A hung transaction hides others' committed records on the same partition until it times out; the default is 60 s."""
OPEN_DEADLINE_S = 120.0
"""Longest opening of a session; state loads at well over 100,000 keys a second."""
RETRY_BACKOFF_MS = 10
"""The broker answers the first produce of a transaction with a retriable error while it still completes the former
one; with aiokafka's default of 100 ms that would cost a quarter of the throughput."""
BATCH_BYTES = 512 * 1024
"""Outputs of one partition travel in batches of this size, within the 1 MiB message limit."""


@dataclass(frozen=True, slots=True)
class FoldId:
    """Which fold: a role and a partition number, within a deployment."""

    deployment: str
    role: str
    partition: int

    @property
    def group(self) -> str:
        """The consumer group of the role."""
        return f"{self.deployment}.{self.role}"

    @property
    def transactional_id(self) -> str:
        """The same for every owner of this fold, so that a new owner fences the old one."""
        return f"{self.deployment}.{self.role}-{self.partition}"

    def __str__(self) -> str:
        return self.transactional_id


@dataclass(frozen=True, slots=True)
class FoldSpec:
    """What a role's folds have in common."""

    declared: Fold
    topology: Topology
    cluster: Cluster
    deployment: str
    kinds: Mapping[str, type]
    new_logic: Callable[[State, int], FoldLogic]
    """Builds the logic from loaded state; the second argument is the partition number."""
    router: Router

    def fold_id(self, partition: int) -> FoldId:
        """The identity of one of the role's folds."""
        return FoldId(self.deployment, self.declared.role, partition)

    def topic(self, name: str) -> str:
        """A declared topic's full name."""
        return full_name(self.deployment, name)

    def inputs(self, partition: int) -> list[TopicPartition]:
        """The fold's inputs on the broker."""
        return [TopicPartition(self.topic(name), partition) for name in self.declared.inputs]


class Session:
    """One ownership of one fold. Open it, run steps, close it; after any failure of a step it is lost for good."""

    def __init__(self, spec: FoldSpec, partition: int) -> None:
        self.spec = spec
        self.id = spec.fold_id(partition)
        self.codec = StateCodec(spec.kinds)
        self.intake = Intake(spec.topology)
        self.state = Overlay()
        self.positions: dict[TopicPartition, int] = {}
        self.topic_ids: dict[str, str] = {}
        self.now_ms = 0
        self.lost = False
        self.logic: FoldLogic
        self.producer: aiokafka.AIOKafkaProducer

    async def open(self) -> None:
        """Take the fold over.

        1. create the producer: fences the former owner and settles its transaction;
        2. load the state from the changelog, ``read_committed``, up to its end: it can no longer move behind our back;
        3. take the positions from it, and hold Kafka's committed offsets against them;
        4. build the logic from the state.

        Raises:
            UnavailableError: Kafka did not answer in time.
            StateError: a position lies outside its log or contradicts Kafka's, an input was re-created, or a changelog
                record cannot be read.
        """
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                await self._open_producer()
                await self._load()
        except (TimeoutError, KafkaError) as error:
            await self.close()
            raise UnavailableError(f"{self.id}: could not take over the fold: {error!r}") from error
        except BaseException:
            await self.close()
            raise
        self.logic = self.spec.new_logic(self.state, self.id.partition)

    async def _open_producer(self) -> None:
        self.producer = self.spec.cluster.producer(
            client_id=self.id.transactional_id,
            transactional_id=self.id.transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            retry_backoff_ms=RETRY_BACKOFF_MS,
            max_batch_size=BATCH_BYTES,
            max_request_size=4 * 1024 * 1024,
            acks="all",
            linger_ms=0,
        )
        await self.producer.start()

    async def _load(self) -> None:
        changelog = TopicPartition(self.spec.topic(self.spec.declared.changelog), self.id.partition)
        consumer = self.spec.cluster.consumer(
            client_id=f"{self.id.transactional_id}-loader",
            group_id=self.id.group,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_partition_fetch_bytes=4 * 1024 * 1024,
            fetch_max_wait_ms=50,
        )
        await consumer.start()
        try:
            consumer.assign([changelog])
            await self._read_changelog(consumer, changelog)
            clock = value_of(self.state, CLOCK_KEY, FoldClock) or FoldClock(0)
            self.now_ms = clock.now_ms
            await self._check_topics(clock.topic_ids)
            await self._read_positions(consumer, clock.positions)
        finally:
            await consumer.stop()
        log.info("session opened", fold=self.id.transactional_id, keys=len(self.state), now_ms=self.now_ms)

    async def _check_topics(self, stored: Mapping[str, str]) -> None:
        """The inputs must be those that the positions were stored for; the broker drops its offsets with a topic."""
        names = {self.spec.topic(name): name for name in self.spec.declared.inputs}
        async with self.spec.cluster.admin() as client:
            self.topic_ids = {names[topic]: known for topic, known in (await topic_ids(client, names)).items()}
        for name, known in self.topic_ids.items():
            if stored.get(name, known) != known:
                raise StateError(
                    f"{self.id}: topic {name!r} was re-created; the fold has a position in an earlier one of that name"
                )

    async def _read_positions(self, consumer: aiokafka.AIOKafkaConsumer, stored: Mapping[str, int]) -> None:
        """Positions as stored in the state; Kafka's committed offsets must agree where the broker still has them."""
        inputs = dict(zip(self.spec.inputs(self.id.partition), self.spec.declared.inputs, strict=True))
        consumer.assign(list(inputs))
        beginnings = await consumer.beginning_offsets(list(inputs))
        ends = await consumer.end_offsets(list(inputs))
        for tp, name in inputs.items():
            position = stored.get(name, beginnings[tp])  # an input that was never read starts at its beginning
            committed = await consumer.committed(tp)
            if committed is not None and committed != position:
                raise StateError(
                    f"{self.id}: Kafka has the offset {committed} of {tp.topic}-{tp.partition}, the state {position}; "
                    "they are committed together, so one of them was changed from outside"
                )
            if not beginnings[tp] <= position <= ends[tp]:
                raise StateError(
                    f"{self.id}: position {position} of {tp.topic}-{tp.partition} lies outside the log "
                    f"({beginnings[tp]} to {ends[tp]}); records are gone, and skipping them silently would lose them"
                )
            self.positions[tp] = position

    async def _read_changelog(self, consumer: aiokafka.AIOKafkaConsumer, changelog: TopicPartition) -> None:
        """Load by position: a changelog that is empty, all tombstones, or ends in markers still comes to its end."""
        start = (await consumer.beginning_offsets([changelog]))[changelog]
        end = await self._log_end(changelog)
        consumer.seek(changelog, start)
        while await consumer.position(changelog) < end:
            for records in (await consumer.getmany(changelog, timeout_ms=200)).values():
                for record in records:
                    key = _state_key(record)
                    self.state.load(key, None if record.value is None else self.codec.decode(key, record.value))

    async def _log_end(self, changelog: TopicPartition) -> int:
        """Where the changelog ends, open transactions included.

        The end of what is committed is no end to load to: while a former owner's transaction is still open, or its
        markers are still being written, everything behind it is hidden, committed or not, and a state without it would
        decide again what was decided. Reading on to the log's own end waits until that is settled.
        """
        consumer = self.spec.cluster.consumer(
            client_id=f"{self.id.transactional_id}-end", isolation_level="read_uncommitted", enable_auto_commit=False
        )
        await consumer.start()
        try:
            return int((await consumer.end_offsets([changelog]))[changelog])
        finally:
            await consumer.stop()

    def named(self, positions: Mapping[TopicPartition, int]) -> dict[str, int]:
        """Positions by the declared names of their topics."""
        prefix = len(self.id.deployment) + 1
        return {tp.topic[prefix:]: offset for tp, offset in positions.items()}

    async def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Commit ``positions`` with everything sent since ``begin``; :class:`Step` says what precedes it.

        Raises:
            FencedError: another owner has taken over.
            UnavailableError: the outcome is unknown; the session is lost, and its successor reads what was decided.
        """
        offsets = {tp: OffsetAndMetadata(offset, "") for tp, offset in positions.items()}
        await self.producer.send_offsets_to_transaction(offsets, self.id.group)
        await self.producer.commit_transaction()

    def new_step(self, records: Records) -> Step:
        """The step that folds ``records``; enter it to begin its transaction."""
        return Step(self, records)

    async def close(self) -> None:
        """Stop the producer. Bounded; an open transaction is left to its timeout or to the next owner's fencing."""
        self.lost = True
        producer = getattr(self, "producer", None)
        if producer is None:
            return
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await producer.stop()
        except (TimeoutError, KafkaError) as error:
            log.warning("producer did not stop cleanly", fold=self.id.transactional_id, error=repr(error))


def _state_key(record: Raw) -> str:
    try:
        return str(record.key, encoding="utf-8")
    except (TypeError, UnicodeDecodeError) as error:
        where = f"{record.topic}-{record.partition}@{record.offset}"
        raise StateError(f"changelog record {where}: {record.key!r} is no state key") from error
