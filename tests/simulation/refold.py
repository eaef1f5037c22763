"""A fold done again, in one go and without a runtime: what its journal says was read, in that order, into a plain dict.

The positions in the journal have to follow each other without a gap or a repeat. What comes out must equal, to the
byte, what the fold has written, and its changelog must hold the same state.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import dead_letter_form
from settler_streams.core.fold import CLOCK_KEY, Emit, FoldClock, Outcome, Record, Value
from settler_streams.errors import RecordError
from settler_streams.events import OffsetRun, StepJournal, decode, encode, envelope
from settler_streams.ids import derived_id
from settler_streams.runtime.intake import Intake
from settler_streams.runtime.routing import Router, key_of
from settler_streams.runtime.state import StateCodec
from settler_streams.workers.folds import FOLDS
from tests.simulation.committed import CommittedLog, Raw
from tests.simulation.world import DEPLOYMENT, TOPOLOGY

Report = Callable[[str], None]
Output = tuple[bytes | None, bytes | None]
INTAKE = Intake(TOPOLOGY)


@dataclass(frozen=True, slots=True)
class Folded:
    """One record as the fold met it. ``record`` is None if it did not decode or belonged elsewhere; ``refused`` is the
    reason of its dead letter."""

    raw: Raw
    record: Record | None
    refused: str | None
    now_ms: int


@dataclass
class Refold:
    """One fold of ``role`` done again from ``log``; differences go to ``report``."""

    log: CommittedLog
    role: str
    partition: int
    report: Report
    folded: list[Folded] = field(default_factory=list)
    state: dict[str, Value] = field(default_factory=dict)
    now_ms: int = 0

    def __post_init__(self) -> None:
        self.fold_id = f"{DEPLOYMENT}.{self.role}-{self.partition}"
        self._declared = TOPOLOGY.fold(self.role)
        self._router = Router(TOPOLOGY)
        self._logic = FOLDS[self.role].new_logic(self.state, self.partition, TOPOLOGY)
        self._outputs: dict[TopicPartition, list[Output]] = {}
        self._unread = {topic: self._committed(topic, self.partition) for topic in self._declared.inputs}
        self._positions = dict.fromkeys(self._declared.inputs, 0)

    def _committed(self, topic: str, partition: int) -> list[Raw]:
        """Committed records, the next one last."""
        return self.log.records(topic, partition)[::-1]

    def run(self) -> Refold:
        """Fold everything, compare, and return itself."""
        for raw in reversed(self._committed(self._declared.journal, self.partition)):
            journal = decode(raw.value).data
            assert isinstance(journal, StepJournal)
            for run in journal.runs:
                self._read(run)
            self._apply(None, self._logic.settle())
            if journal.now_ms != self.now_ms:
                self.report(f"{self.fold_id}: a step took {journal.now_ms} for now, the records say {self.now_ms}")
        self._compare_outputs()
        self._compare_state()
        return self

    def _read(self, run: OffsetRun) -> None:
        topic = run.topic[len(DEPLOYMENT) + 1 :]
        unread = self._unread[topic]
        if not unread or unread[-1].offset != run.first:
            stands_at = unread[-1].offset if unread else "its end"
            self.report(f"{self.fold_id}: {topic} was read from {run.first}, but stood at {stands_at}")
        read: list[Raw] = []
        while unread and unread[-1].offset <= run.last:
            read.append(unread.pop())
        if (len(read), read[-1].offset if read else -1) != (run.records, run.last):
            self.report(f"{self.fold_id}: {run} of {topic} has {len(read)} committed records")
        self._positions[topic] = run.last + 1
        for raw in read:
            self._fold(topic, raw)

    def _fold(self, topic: str, raw: Raw) -> None:
        self.now_ms = max(self.now_ms, raw.timestamp)
        record, refused = None, None
        try:
            record = self._received(topic, raw)
            if record is not None:
                self._apply(record, self._logic.decide(record, self.now_ms))
        except RecordError as error:
            refused = error.reason
            letter = dead_letter_form.letter(raw, self.role, error, self.now_ms)
            self._expect("dead-letters", raw.partition % TOPOLOGY.partitions("dead-letters"), letter.key, letter.value)
        self.folded.append(Folded(raw, record, refused, self.now_ms))

    def _received(self, topic: str, raw: Raw) -> Record | None:
        key = key_of(raw.key)
        home = self._router.home_of(topic, key, self.partition)
        if home == self.partition:
            return Record(topic, self.partition, raw.offset, key, INTAKE.event_of(topic, raw), None)
        if TOPOLOGY.forwarder(topic) == self.role:
            INTAKE.check_size(topic, raw)
            self._expect(topic, home, raw.key, raw.value)
        return None

    def _apply(self, record: Record | None, outcome: Outcome) -> None:
        self._put(outcome.changes)
        for emit in outcome.emits:
            self._expect_event(record, emit)

    def _put(self, changes: Mapping[str, Value | None]) -> None:
        for key, value in changes.items():
            if value is None:
                self.state.pop(key, None)
            else:
                self.state[key] = value

    def _expect_event(self, record: Record | None, emit: Emit) -> None:
        event_id = emit.event_id
        if event_id is None:
            assert record is not None
            event_id = derived_id(record.event.id, emit.suffix)
        time = dt.datetime.fromtimestamp(self.now_ms / 1000, dt.UTC)
        source = f"/{DEPLOYMENT}/{self.role}"
        event = envelope(
            emit.data, event_id=event_id, source=source, tenant=emit.tenant, time=time, subject=emit.subject
        )
        partition = self._router.partition_for(emit.topic, emit.key) if emit.partition is None else emit.partition
        self._expect(emit.topic, partition, emit.key.encode(), encode(event))

    def _expect(self, topic: str, partition: int, key: bytes | None, value: bytes | None) -> None:
        tp = TopicPartition(f"{DEPLOYMENT}.{topic}", partition)
        self._outputs.setdefault(tp, []).append((key, value))

    def _compare_outputs(self) -> None:
        """Every output of the fold, in order within its partition, and no other one."""
        own = {f"{DEPLOYMENT}.{self._declared.changelog}", f"{DEPLOYMENT}.{self._declared.journal}"}
        found = {
            tp: [(raw.key, raw.value) for raw in records]
            for tp, records in self.log.written_by(self.fold_id).items()
            if tp.topic not in own
        }
        for tp in sorted(found.keys() | self._outputs.keys()):
            written, expected = found.get(tp, []), self._outputs.get(tp, [])
            if written != expected:
                self.report(
                    f"{self.fold_id}: {tp.topic}-{tp.partition} has {len(written)} outputs, {len(expected)} expected; "
                    f"first difference: {_first_difference(written, expected)}"
                )

    def _compare_state(self) -> None:
        codec = StateCodec(FOLDS[self.role].kinds)
        stored = {
            raw.key.decode(): raw.value for raw in reversed(self._committed(self._declared.changelog, self.partition))
        }
        stored = {key: value for key, value in stored.items() if value is not None}
        clock = codec.decode(CLOCK_KEY, stored.pop(CLOCK_KEY)) if CLOCK_KEY in stored else FoldClock(0)
        expected = {key: codec.encode(value) for key, value in self.state.items()}
        if stored != expected:
            wrong = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
            self.report(f"{self.fold_id}: the changelog differs from the fold's state in {wrong}")
        assert isinstance(clock, FoldClock)
        self._compare_positions(clock)

    def _compare_positions(self, clock: FoldClock) -> None:
        """The state, Kafka's group and the journal name the same positions, and nothing lies beyond them."""
        group = f"{DEPLOYMENT}.{self.role}"
        for topic, position in self._positions.items():
            committed = self.log.offsets.get((group, TopicPartition(f"{DEPLOYMENT}.{topic}", self.partition)), 0)
            if not position == committed == clock.positions.get(topic, 0):
                self.report(f"{self.fold_id}: {topic} was read to {position}, Kafka has {committed}, the state {clock}")
            if self._unread[topic]:
                self.report(f"{self.fold_id}: {len(self._unread[topic])} records of {topic} were never read")


def _first_difference(written: list[Output], expected: list[Output]) -> str:
    for number, (one, other) in enumerate(zip(written, expected, strict=False)):
        if one != other:
            return f"number {number}: {one!r:.400} instead of {other!r:.400}"
    longer = written if len(written) > len(expected) else expected
    return f"{'more' if longer is written else 'missing'}: {longer[min(len(written), len(expected))]!r:.400}"
