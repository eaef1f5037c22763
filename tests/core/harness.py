"""Folds as black boxes: records in, events out, over an in-memory state that is stored and loaded as a session does."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from settler_streams.core.fold import CLOCK_KEY, Emit, FoldClock, FoldLogic, Outcome, Record, State
from settler_streams.errors import RecordError
from settler_streams.events import Part, envelope
from settler_streams.ids import PLATFORM, derived_id
from settler_streams.runtime.state import Overlay, StateCodec

START_MS = 1_764_000_000_000
"""24 November 2025, 16:00 UTC: a day like any other, six days before the end of its month."""


def uid(name: str) -> str:
    """A UUID that a test can call by name."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


@dataclass
class Fold:
    """One fold. Each record is one step: decided, applied, committed; its outcome is kept with its emits."""

    new_logic: Callable[[State], FoldLogic]
    now_ms: int = START_MS
    partition: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    dead: list[tuple[int, RecordError]] = field(default_factory=list)
    offset: int = 0

    def __post_init__(self) -> None:
        self.state = Overlay()
        self.logic = self.new_logic(self.state)
        self.codec = StateCodec(self.logic.kinds)

    def stored(self) -> dict[str, bytes]:
        """The state as its changelog holds it."""
        return {key: self.codec.encode(value) for key, value in self.state.items() if key != CLOCK_KEY}

    def restart(self) -> None:
        """A new owner: the logic is built again from what the changelog holds, in another order."""
        state = Overlay()
        for key, stored in sorted(self.stored().items(), reverse=True):
            state.load(key, self.codec.decode(key, stored))
        self.state = state
        self.logic = self.new_logic(state)

    def record(
        self,
        data: Part,
        tenant: str = PLATFORM,
        *,
        topic: str = "topic",
        key: str | None = None,
        event_id: str | None = None,
        source: str = "/test",
        time_ms: int | None = None,
    ) -> Record:
        """The next record of the log."""
        self.offset += 1
        time = dt.datetime.fromtimestamp((self.now_ms if time_ms is None else time_ms) / 1000, dt.UTC)
        event = envelope(
            data, event_id=event_id or uid(f"event {self.offset}"), source=source, tenant=tenant, time=time
        )
        return Record(topic, self.partition, self.offset, tenant if key is None else key, event)

    def feed(self, data: Part, tenant: str = PLATFORM, **where: Any) -> tuple[Emit, ...]:
        """Fold one record; a record that cannot be decided becomes a dead letter. Returns what it emits."""
        return self.fold(self.record(data, tenant, **where))

    def fold(self, record: Record) -> tuple[Emit, ...]:
        """Fold a record that was made before."""
        try:
            outcome = self.logic.decide(record, self.now_ms)
        except RecordError as error:
            self.dead.append((record.offset, error))
            return ()
        self.state.apply(outcome.changes)
        settled = self.logic.settle()
        self.state.apply(settled.changes)
        self.state.apply({CLOCK_KEY: FoldClock(self.now_ms)})
        self.state.merge()
        assert all(emit.event_id for emit in settled.emits), "what a step has led to has no record to be named after"
        outcome = msgspec.structs.replace(outcome, emits=outcome.emits + settled.emits)
        ids = [emit.event_id or derived_id(record.event.id, emit.suffix) for emit in outcome.emits]
        assert len(ids) == len(set(ids)), "two outputs of one record share an id"
        self.outcomes.append(outcome)
        return outcome.emits

    def step(self, *records: Record) -> list[Emit]:
        """Fold several records as one step; returns all that it emits. What cannot be decided becomes a dead letter."""
        emits: list[Emit] = []
        for record in records:
            try:
                outcome = self.logic.decide(record, self.now_ms)
            except RecordError as error:
                self.dead.append((record.offset, error))
                continue
            self.state.apply(outcome.changes)
            emits += outcome.emits
        settled = self.logic.settle()
        self.state.apply(settled.changes)
        self.state.merge()
        return [*emits, *settled.emits]

    def emitted(self, kind: type[Part]) -> list[Emit]:
        """Every event of one type so far."""
        return [emit for outcome in self.outcomes for emit in outcome.emits if isinstance(emit.data, kind)]

    def reasons(self) -> list[str]:
        """Why the dead letters died, in order."""
        return [error.reason for _, error in self.dead]
