"""The step: one batch of one fold, folded and published in one Kafka transaction.

    1. begin                        4. write outputs, changelog, journal and dead letters
    2. decode the batch             5. await every send
    3. fold it into an overlay      6. add the input offsets
                                    7. commit
                                    8. merge the overlay

Step 5 is what makes step 7 honest: aiokafka commits a transaction whose produces have failed, so every send is awaited
before the offsets are added. Any failure aborts, and the session is lost with it. Sends and offsets are not under way
together: the broker would look at both at once and refuse one of them for the moment, and nothing is gained in the end.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka.errors import IllegalOperation, KafkaError
from aiokafka.structs import TopicPartition

from settler_streams import __version__
from settler_streams.adapters.kafka import dead_letter_form as deadletters
from settler_streams.adapters.kafka.fencing import fenced
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.core.fold import CLOCK_KEY, NOTHING, FoldClock, FoldLogic, Outcome, Record
from settler_streams.errors import FencedError, RecordError, StateError, UnavailableError
from settler_streams.events import CONTENT_TYPE, OffsetRun, Part, StepJournal, Write, writer_of
from settler_streams.ids import PLATFORM, derived_id
from settler_streams.runtime.intake import TRACEPARENT, Raw, traceparent_of
from settler_streams.runtime.observation import Observation
from settler_streams.runtime.outputs import Headers, Outputs

if TYPE_CHECKING:
    from settler_streams.runtime.session import Session

log = structlog.get_logger(__name__)

STEP_DEADLINE_S = 30.0
"""Longest wait for one Kafka answer inside a step: three transaction timeouts. Beyond it the session is lost."""

Records = Mapping[TopicPartition, Sequence[Raw]]

Add = Callable[[bytes | None, bytes | None, Headers], None]
Target = tuple[Add, bytes, Write[Any], bool]

_CONTENT_TYPE = ("content-type", CONTENT_TYPE.encode())
_PLAIN: Headers = [_CONTENT_TYPE]
_NO_HEADERS: Headers = []
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Step:
    """The work on one batch. Use it as an asynchronous context: entering begins, leaving commits or aborts."""

    def __init__(self, session: Session, records: Records) -> None:
        self._session = session
        self._spec = session.spec
        self._records = records
        self._outputs = Outputs(session.producer)
        self._raw: Raw | None = None
        self._record: Record | None = None
        self._observation = Observation(session.id.role, session.id.partition)
        self.now_ms = session.now_ms
        self._targets: dict[tuple[type[Part], str, str, int | None], Target] = {}
        """Where events go, by type, topic, key and partition: found once a step, as many of a batch go the same way."""
        self._source = f"/{session.id.deployment}/{session.id.role}"
        self._time_ms, self._time = -1, _EPOCH
        """When the last events were made: many of a batch share their millisecond."""
        self._check_positions()

    async def __aenter__(self) -> Step:
        if self._session.lost:
            # The logic may have seen records whose transaction was aborted.
            raise StateError(f"{self._session.id.transactional_id}: the session is lost and takes no further step")
        await self._bounded(self._session.producer.begin_transaction())
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self._abort(error)
            return
        try:
            await self._commit()
        except BaseException as failure:
            await self._abort(failure)
            raise

    def fold(self, logic: FoldLogic) -> None:
        """Put the whole batch through ``logic``: its changes into the overlay, its events into the transaction."""
        decide, apply, publish = self.decide, self._session.state.apply, self.publish
        for record in self.decode():
            outcome = decide(logic, record)
            if outcome.changes:
                apply(outcome.changes)
            if outcome.emits or outcome.tombstones:
                publish(outcome)
        settled = logic.settle()
        apply(settled.changes)
        publish(settled)

    def decode(self) -> Iterator[Record]:
        """The batch's records in order, decoded.

        What cannot be decoded becomes a dead letter; what lies in a wrong partition is forwarded to the right one, by
        one of the folds that read it.
        """
        partition = self._session.id.partition
        prefix = len(self._spec.deployment) + 1
        place_of, event_of = self._spec.router.place_of, self._session.intake.event_of
        for tp, raws in self._records.items():
            topic = tp.topic[prefix:]
            compacted = topic in self._spec.router.compacted
            for raw in raws:
                self._raw = raw
                if raw.timestamp > self.now_ms:
                    self.now_ms = raw.timestamp
                try:
                    key, home = place_of(topic, raw.key, partition)
                    if home != partition:
                        self._forward(topic, home, raw)
                        continue
                    if compacted and raw.value is None:
                        continue  # a tombstone; what it stands for has been said by an event of its own
                    event = event_of(topic, raw)
                except RecordError as error:
                    self._dead_letter(raw, error)
                    continue
                record = self._record = Record(
                    topic, partition, raw.offset, key, event, traceparent_of(raw) if raw.headers else None
                )
                yield record
        self._raw = self._record = None

    def _forward(self, topic: str, home: int, raw: Raw) -> None:
        """Put a record of a wrong partition into its own. One of the folds that read the topic does it."""
        if self._spec.topology.forwarder(topic) == self._session.id.role:
            self._session.intake.check_size(topic, raw)
            self._outputs.lane(raw.topic, home).add(raw.key, raw.value, list(raw.headers))

    def decide(self, logic: FoldLogic, record: Record) -> Outcome:
        """Ask the core; a record that it cannot decide becomes a dead letter and changes nothing."""
        try:
            return logic.decide(record, self.now_ms)
        except RecordError as error:
            assert self._raw is not None  # noqa: S101 - set for as long as a record is being decided
            self._dead_letter(self._raw, error)
            return NOTHING

    def apply(self, outcome: Outcome) -> None:
        """Put the decision's changes into the overlay."""
        self._session.state.apply(outcome.changes)

    def publish(self, outcome: Outcome) -> None:
        """Add the decision's events to the transaction.

        Their ids and trace context follow from the record in hand, unless they have their own; what settling a step has
        led to has.
        """
        record = self._record
        inherited = record.traceparent if record is not None else None
        if self.now_ms != self._time_ms:
            self._time_ms, self._time = self.now_ms, dt.datetime.fromtimestamp(self.now_ms / 1000, dt.UTC)
        targets, source, time = self._targets, self._source, self._time
        for emit in outcome.emits:
            data = emit.data
            way = (type(data), emit.topic, emit.key, emit.partition)
            add, key, write, observed = targets.get(way) or self._target(way)
            event_id = emit.event_id
            if event_id is None:
                assert record is not None  # noqa: S101 - what settling has led to follows from no single record
                event_id = derived_id(record.event.id, emit.suffix)
            trace = inherited if emit.traceparent is None else emit.traceparent
            headers = [_CONTENT_TYPE, (TRACEPARENT, trace)] if trace else _PLAIN
            add(key, write(data, event_id, source, emit.tenant, time, emit.subject), headers)
            if observed:
                self._observation.published(emit)
        for stone in outcome.tombstones:
            self._spec.router.check_tombstone(self._session.id.role, stone.topic)
            self._outputs.lane(self._spec.topic(stone.topic), stone.partition).add(
                stone.key.encode(), None, _NO_HEADERS
            )
        self._observation.outputs += len(outcome.emits) + len(outcome.tombstones)

    def _target(self, way: tuple[type[Part], str, str, int | None]) -> Target:
        """The lane, key and writer of events that go this way, and whether they are counted by type."""
        body, topic, key, partition = way
        self._spec.router.check_output(self._session.id.role, topic, body.event_type)
        if partition is None:
            partition = self._spec.router.partition_for(topic, key)
        lane = self._outputs.lane(self._spec.topic(topic), partition)
        target = self._targets[way] = lane.add, key.encode(), writer_of(body), body in METRICS.wanted
        return target

    def _dead_letter(self, raw: Raw, error: RecordError) -> None:
        partition = raw.partition % self._spec.topology.partitions("dead-letters")
        letter = deadletters.letter(raw, self._session.id.role, error, self.now_ms)
        lane = self._outputs.lane(self._spec.topic("dead-letters"), partition)
        lane.add(letter.key, letter.value, letter.headers)
        self._observation.dead_letter(error.reason)
        where = f"{raw.topic}-{raw.partition}@{raw.offset}"
        log.warning("dead letter", record=where, reason=error.reason, detail=error.detail[:300])

    def _check_positions(self) -> None:
        """Positions never go back: a record that a committed step has already consumed must not be folded again."""
        for tp, raws in self._records.items():
            if raws[0].offset < (position := self._session.positions[tp]):
                raise StateError(f"{tp.topic}-{tp.partition}: got offset {raws[0].offset}, stand at {position}")

    async def _commit(self) -> None:
        session = self._session
        positions = session.positions | {tp: raws[-1].offset + 1 for tp, raws in self._records.items()}
        session.state.apply({CLOCK_KEY: FoldClock(self.now_ms, session.named(positions), session.topic_ids)})
        self._add_changelog()
        self._add_journal()
        await self._bounded(self._outputs.send_all())
        await self._bounded(session.add_offsets(positions))
        await self._bounded(session.commit())
        session.positions = positions
        session.state.merge()
        session.now_ms = self.now_ms
        self._observation.committed(sum(len(raws) for raws in self._records.values()), self.now_ms)

    def _add_changelog(self) -> None:
        session = self._session
        add = self._outputs.lane(self._spec.topic(self._spec.declared.changelog), session.id.partition).add
        encode = session.codec.encode
        for key, value in session.state.changes.items():
            add(key.encode(), None if value is None else encode(value), _NO_HEADERS)

    def _add_journal(self) -> None:
        fold = self._session.id
        runs = tuple(
            OffsetRun(topic=tp.topic, first=raws[0].offset, last=raws[-1].offset, records=len(raws))
            for tp, raws in self._records.items()
        )
        body = StepJournal(
            role=fold.role,
            partition=fold.partition,
            runs=runs,
            now_ms=self.now_ms,
            outputs=self._observation.outputs,
            code_version=__version__,
        )
        event_id = derived_id(PLATFORM, f"{fold.transactional_id}/{runs[0].topic}/{runs[0].first}")
        time = dt.datetime.fromtimestamp(self.now_ms / 1000, dt.UTC)
        value = writer_of(StepJournal)(body, event_id, self._source, PLATFORM, time, None)
        journal = self._outputs.lane(self._spec.topic(self._spec.declared.journal), fold.partition)
        journal.add(fold.role.encode(), value, _PLAIN)

    async def _abort(self, error: BaseException) -> None:
        session = self._session
        session.lost = True
        session.state.discard()
        log.error("step aborted", fold=session.id.transactional_id, error=repr(error))
        if isinstance(error, FencedError):
            return
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await session.producer.abort_transaction()
        except (TimeoutError, KafkaError, IllegalOperation, AssertionError) as failure:
            # aiokafka refuses where its own state allows no abort: after a fatal error, or within a commit. The
            # transaction's own timeout, or the next owner's fencing, ends it; nothing of it becomes visible.
            log.warning("abort not confirmed", fold=session.id.transactional_id, error=repr(failure))

    async def _bounded(self, work: Awaitable[None]) -> None:
        fold = self._session.id.transactional_id
        try:
            async with asyncio.timeout(STEP_DEADLINE_S):
                await work
        except TimeoutError as error:
            raise UnavailableError(f"{fold}: Kafka gave no answer in {STEP_DEADLINE_S:.0f} s") from error
        except (KafkaError, IllegalOperation) as error:
            if fenced(error):
                raise FencedError(f"{fold}: a newer owner has taken over the fold") from error
            raise UnavailableError(f"{fold}: {error!r}") from error
