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
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IllegalOperation, KafkaError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.fencing import fenced
from settler_streams.adapters.kafka.topic_ids import topic_ids
from settler_streams.core.fold import CLOCK_KEY, FoldClock, FoldLogic, State, value_of
from settler_streams.errors import FencedError, SettlerError, StateError, UnavailableError
from settler_streams.runtime import collector
from settler_streams.runtime.intake import Intake
from settler_streams.runtime.reader import InputReader, kafka_errors, new_consumer
from settler_streams.runtime.routing import Router
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.runtime.step import STEP_DEADLINE_S, Records, Step
from settler_streams.topology import TOMBSTONES_MS, Fold, Topology, full_name

log = structlog.get_logger(__name__)

TRANSACTION_TIMEOUT_MS = 10_000
"""A hung transaction hides others' committed records on the same partition until it times out; the default is 60 s."""
OPEN_DEADLINE_S = 120.0
"""Longest stretch of opening in which nothing is loaded. Each load begins at the changelog's beginning: if it were
bounded in total, a fold whose changelog has outgrown the bound would never open again."""
LOAD_DEADLINE_S = TOMBSTONES_MS / 2_000
"""Longest load, half as long as tombstones are kept: a longer one could have read what was deleted since, and pass by
where the tombstone lay."""
COMMITTED_RETRY_S = 0.1
"""A broker that has just started may not know a group's offsets yet; it is asked again, as long as opening may take."""
OFFSETS_SETTLE_S = 10.0
"""As long as a transaction may take: after that, offsets that are behind the state were changed from outside."""
BARRIER_KEY = b"barrier"
"""Key of the record with which a new owner finds the end of its changelog; it is never committed."""
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
        self.loaded = 0
        self.now_ms = 0
        self.taken = False
        self.lost = False
        self.logic: FoldLogic
        self.producer: aiokafka.AIOKafkaProducer
        self._loader: aiokafka.AIOKafkaConsumer | None = None
        self._consumer: aiokafka.AIOKafkaConsumer | None = None
        self._reader: InputReader
        self._patience: asyncio.Timeout

    async def open(self) -> None:
        """Take the fold over.

        1. create the producer: fences the former owner and settles its transaction;
        2. load the state from the changelog, ``read_committed``, up to a record of our own: it can no longer move
           behind our back, and nothing before that record is still undecided;
        3. take the positions from it, and hold Kafka's committed offsets against them;
        4. build the logic from the state.

        The load goes on for as long as it gets on, half a day at most; all else is bounded by two minutes.

        Raises:
            UnavailableError: Kafka did not answer in time.
            FencedError: another owner has taken over meanwhile; what this one read of the two contradicts itself.
            StateError: a position lies outside its log or contradicts Kafka's, an input was re-created, a changelog
                record cannot be read, or the state contradicts itself.
        """
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S) as self._patience:
                await self._open_producer()
                await self._load()
            self.logic = self._new_logic()
        except (TimeoutError, KafkaError, IllegalOperation) as error:
            await self.close()
            if fenced(error):
                raise FencedError(f"{self.id}: a newer owner took over while this one was opening") from error
            raise UnavailableError(f"{self.id}: could not take over the fold: {error!r}") from error
        except StateError as error:
            try:
                overtaken = await self._is_fenced()
            finally:
                await self.close()
            if overtaken:
                raise FencedError(f"{self.id}: a newer owner took over while this one was opening") from error
            raise
        except BaseException:
            await self.close()
            raise

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
        self.taken = True

    def _new_logic(self) -> FoldLogic:
        """The logic over what was loaded. Of a changelog that a newer owner has had compacted meanwhile that is a part
        of the old and a part of the new, in which anything may be missing.

        Raises:
            StateError: there is none over this state.
            ConfigurationError: it needs a file, such as the tiers, that cannot be read.
        """
        try:
            return self.spec.new_logic(self.state, self.id.partition)
        except SettlerError:
            raise
        except Exception as error:
            raise StateError(f"{self.id}: the state contradicts itself: {error!r}") from error

    async def _is_fenced(self) -> bool:
        """Ask the broker whether a newer owner exists, by a transaction that is aborted."""
        asked = {self.spec.inputs(self.id.partition)[0]: OffsetAndMetadata(0, "")}
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await self.producer.begin_transaction()
                await self.producer.send_offsets_to_transaction(asked, self.id.group)
                await self.producer.abort_transaction()
        except (TimeoutError, KafkaError) as error:
            return fenced(error)
        return False

    async def _load(self) -> None:
        changelog = TopicPartition(self.spec.topic(self.spec.declared.changelog), self.id.partition)
        loader = self._loader = new_consumer(self.spec.cluster, self.id.transactional_id)
        await loader.start()
        loader.assign([changelog])
        await self._read_changelog(loader, changelog)
        await loader.stop()
        clock = value_of(self.state, CLOCK_KEY, FoldClock) or FoldClock(0)
        self.now_ms = clock.now_ms
        self._consumer = new_consumer(self.spec.cluster, self.id.transactional_id)
        await self._consumer.start()
        self._reader = InputReader(self.id.role, self._consumer, self.spec.inputs(self.id.partition))
        async with self.spec.cluster.admin() as client:
            await self._check_topics(client, clock.topic_ids)
            committed = await self._committed(client, clock.positions)
        await self._read_positions(clock.positions, committed)
        self._reader.begin(self.positions)
        log.info("session opened", fold=self.id.transactional_id, keys=len(self.state), now_ms=self.now_ms)

    async def _check_topics(self, client: AIOKafkaAdminClient, stored: Mapping[str, str]) -> None:
        """The inputs must be those that the positions were stored for; the broker drops its offsets with a topic."""
        names = {self.spec.topic(name): name for name in self.spec.declared.inputs}
        self.topic_ids = {names[topic]: known for topic, known in (await topic_ids(client, names)).items()}
        for name, known in self.topic_ids.items():
            if stored.get(name, known) != known:
                raise StateError(
                    f"{self.id}: topic {name!r} was re-created; the fold has a position in an earlier one of that name"
                )

    async def _committed(self, client: AIOKafkaAdminClient, stored: Mapping[str, int]) -> dict[TopicPartition, int]:
        """The group's committed offsets where the broker has some.

        It is asked again while it starts up, and for a while when it is behind the state: both were committed together,
        and the markers of the offsets may still be on their way.
        """
        tps = self.spec.inputs(self.id.partition)
        wanted = {tp: stored.get(name, 0) for tp, name in zip(tps, self.spec.declared.inputs, strict=True)}
        loop = asyncio.get_running_loop()
        patient_until_s = loop.time() + OFFSETS_SETTLE_S
        while True:
            try:
                found = await client.list_consumer_group_offsets(self.id.group, partitions=tps)
            except KafkaError as error:
                if not error.retriable:
                    raise
                found = {}
            if found.keys() >= set(tps):
                committed = {tp: known.offset for tp, known in found.items() if known.offset >= 0}
                behind = any(offset < wanted[tp] for tp, offset in committed.items() if tp in wanted)
                if not behind or loop.time() >= patient_until_s:
                    return committed
            await asyncio.sleep(COMMITTED_RETRY_S)

    async def _read_positions(self, stored: Mapping[str, int], committed: Mapping[TopicPartition, int]) -> None:
        """Positions as stored in the state; Kafka's committed offsets must agree where the broker still has them."""
        inputs = dict(zip(self.spec.inputs(self.id.partition), self.spec.declared.inputs, strict=True))
        beginnings, ends = await self._reader.bounds()
        for tp, name in inputs.items():
            position = stored.get(name, beginnings[tp])  # an input that was never read starts at its beginning
            if (offset := committed.get(tp, position)) != position:
                raise StateError(
                    f"{self.id}: Kafka has the offset {offset} of {tp.topic}-{tp.partition}, the state {position}; "
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
        end = await self._settled_end(changelog)
        consumer.seek(changelog, start)
        loop = asyncio.get_running_loop()
        latest_s = loop.time() + LOAD_DEADLINE_S
        self.loaded = start
        with collector.paused():
            while self.loaded < end:
                for records in (await consumer.getmany(changelog, timeout_ms=200)).values():
                    self.state.load_changelog(self.codec, records)
                if (position := await consumer.position(changelog)) > self.loaded:
                    self.loaded = position
                    self._patience.reschedule(min(loop.time() + OPEN_DEADLINE_S, latest_s))

    async def _settled_end(self, changelog: TopicPartition) -> int:
        """Where the changelog ends, and up to where everything in it will be decided: behind a record of our own.

        That we are the owner does not mean that what former owners have committed can be read yet. Their markers may
        still be on their way, and a broker that was frozen or restarted shows what it holds only when something new is
        appended. A state without it would decide again what was decided. So the new owner appends first, in a
        transaction that it aborts: the reader gets past that record only when all before it is settled.
        """
        await self.producer.begin_transaction()
        batch = self.producer.create_batch()
        batch.append(timestamp=None, key=BARRIER_KEY, value=None)
        batch.close()
        stored = await self.producer.send_batch(batch, changelog.topic, partition=changelog.partition)
        end = int((await stored).offset) + 1
        await self.producer.abort_transaction()
        return end

    def named(self, positions: Mapping[TopicPartition, int]) -> dict[str, int]:
        """Positions by the declared names of their topics."""
        prefix = len(self.id.deployment) + 1
        return {tp.topic[prefix:]: offset for tp, offset in positions.items()}

    async def add_offsets(self, positions: Mapping[TopicPartition, int]) -> None:
        """Make ``positions`` part of the transaction.

        Raises:
            KafkaError: the broker refuses them, or another owner has taken over.
        """
        offsets = {tp: OffsetAndMetadata(offset, "") for tp, offset in positions.items()}
        await self.producer.send_offsets_to_transaction(offsets, self.id.group)

    async def commit(self) -> None:
        """Commit everything since ``begin``; :class:`Step` says what precedes it.

        Raises:
            KafkaError: another owner has taken over; or the outcome is unknown: the session is lost, and its successor
                reads what was decided.
        """
        await self.producer.commit_transaction()

    async def fetch(self, wait_s: float) -> Records:
        """The next records of the inputs; empty after ``wait_s`` seconds. What was handed out is not handed out again.

        Raises:
            UnavailableError: they cannot be read.
            FencedError: another owner has taken over, and retention has cut what it has read since.
            StateError: the log does not hold the position any more.
        """
        try:
            with kafka_errors(self.id):
                return await self._reader.fetch(wait_s)
        except StateError as error:
            if await self._is_fenced():
                raise FencedError(f"{self.id}: a newer owner has read on, and the log was cut behind it") from error
            raise

    async def backlog(self) -> tuple[list[int], bool]:
        """The offsets that are read next, and whether the broker, asked now, holds records there.

        Raises:
            UnavailableError: the broker did not answer.
        """
        with kafka_errors(self.id):
            return await self._reader.backlog()

    def new_step(self, records: Records) -> Step:
        """The step that folds ``records``; enter it to begin its transaction."""
        return Step(self, records)

    async def close(self) -> None:
        """Stop its clients. Bounded; an open transaction is left to its timeout or to the next owner's fencing."""
        self.lost = True
        opened = (self._loader, self._consumer, getattr(self, "producer", None))
        clients = [client for client in opened if client is not None]
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await asyncio.gather(*(client.stop() for client in clients))
        except (TimeoutError, KafkaError) as error:
            log.warning("clients did not stop cleanly", fold=self.id.transactional_id, error=repr(error))
