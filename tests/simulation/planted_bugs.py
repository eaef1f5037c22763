"""Planted bugs: each is one change to the product that the simulation has to notice.

A mutant patches one or two functions through ``patch`` (pytest's ``monkeypatch``); what it breaks is its name.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from settler_streams.core.accounts import Account
from settler_streams.core.dedup import SeenWindow
from settler_streams.core.leases import Roster
from settler_streams.errors import UnavailableError
from settler_streams.ids import PLATFORM
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.outputs import Lane, Outputs
from settler_streams.runtime.routing import Router
from settler_streams.runtime.runner import FoldRunner
from settler_streams.runtime.session import Session
from settler_streams.runtime.state import Overlay
from settler_streams.runtime.step import STEP_DEADLINE_S, Step
from tests.simulation.broker import Broker, Producer
from tests.simulation.clients import Consumer, SimulatedCluster
from tests.simulation.member import Member

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(plant: Mutant) -> Mutant:
    """Register a planted bug under its name."""
    MUTANTS[plant.__name__.strip("_").replace("_", " ")] = plant
    return plant


@mutant
def commit_without_awaiting_the_sends(patch: Patch) -> None:
    async def send_all(self: Outputs) -> None:
        for (topic, partition), batches in self._batches.items():
            for batch in batches:
                await self._producer.send_batch(batch, topic, partition=partition)

    patch.setattr(Outputs, "send_all", send_all)


@mutant
def merge_before_commit(patch: Patch) -> None:
    commit = Session.commit

    async def merging(self: Session) -> None:
        self.state.merge()
        await commit(self)

    patch.setattr(Session, "commit", merging)


@mutant
def position_stored_off_by_one(patch: Patch) -> None:
    add_offsets, named = Session.add_offsets, Session.named

    def one_less(positions: Mapping[Any, int]) -> dict[Any, int]:
        return {where: max(0, offset - 1) for where, offset in positions.items()}

    patch.setattr(Session, "add_offsets", lambda self, positions: add_offsets(self, one_less(positions)))
    patch.setattr(Session, "named", lambda self, positions: named(self, one_less(positions)))


@mutant
def state_kept_after_an_unknown_commit_outcome(patch: Patch) -> None:
    commit = Session.commit

    async def believing(self: Session) -> None:
        try:
            async with asyncio.timeout(STEP_DEADLINE_S / 2):
                await commit(self)
        except TimeoutError:
            await self._open_producer()

    patch.setattr(Session, "commit", believing)


@mutant
def a_lost_session_goes_on(patch: Patch) -> None:
    enter, leave = Step.__aenter__, Step.__aexit__

    async def entering(self: Step) -> Step:
        self._session.lost = False
        return await enter(self)

    async def leaving(self: Step, *error: Any) -> bool:
        try:
            await leave(self, *error)
        except UnavailableError:
            return True
        return False

    patch.setattr(Step, "__aenter__", entering)
    patch.setattr(Step, "__aexit__", leaving)


@mutant
def producer_created_again_inside_a_session(patch: Patch) -> None:
    enter = Step.__aenter__

    async def entering(self: Step) -> Step:
        await self._session._open_producer()
        self._outputs._producer = self._session.producer
        return await enter(self)

    patch.setattr(Step, "__aenter__", entering)


@mutant
def offsets_left_out_of_the_transaction(patch: Patch) -> None:
    async def nothing(_session: Session, _positions: Any) -> None:
        return None

    patch.setattr(Session, "add_offsets", nothing)


@mutant
def offsets_in_a_transaction_of_their_own(patch: Patch) -> None:
    add_offsets, commit = Session.add_offsets, Session.commit
    positions_of: dict[Session, Any] = {}

    async def remembered(self: Session, positions: Any) -> None:
        positions_of[self] = positions

    async def twice(self: Session) -> None:
        await commit(self)
        await self.producer.begin_transaction()
        await add_offsets(self, positions_of.pop(self))
        await commit(self)

    patch.setattr(Session, "add_offsets", remembered)
    patch.setattr(Session, "commit", twice)


def _every(number: int) -> Callable[[], bool]:
    """True at every ``number``-th call."""
    calls = itertools.count(1)
    return lambda: next(calls) % number == 0


@mutant
def an_output_dropped(patch: Patch) -> None:
    add, now = Lane.add, _every(50)
    patch.setattr(Lane, "add", lambda self, *record: None if now() else add(self, *record))


@mutant
def an_output_doubled(patch: Patch) -> None:
    add, now = Lane.add, _every(50)

    def doubling(self: Lane, *record: Any) -> None:
        add(self, *record)
        if now():
            add(self, *record)

    patch.setattr(Lane, "add", doubling)


@mutant
def an_output_under_another_tenant(patch: Patch) -> None:
    publish, now = Step.publish, _every(50)

    def leaking(self: Step, outcome: Any) -> None:
        emits = [replace(emit, tenant=PLATFORM) if now() else emit for emit in outcome.emits]
        publish(self, replace(outcome, emits=tuple(emits)))

    patch.setattr(Step, "publish", leaking)


@mutant
def dead_letters_forgotten(patch: Patch) -> None:
    patch.setattr(Step, "_dead_letter", lambda *_: None)


@mutant
def outputs_in_another_order(patch: Patch) -> None:
    publish = Step.publish

    def backwards(self: Step, outcome: Any) -> None:
        held = getattr(self, "held", None)
        self.held = None if held else (outcome, self._record)  # type: ignore[attr-defined]
        if held:
            publish(self, outcome)
            own, self._record = self._record, held[1]
            publish(self, held[0])
            self._record = own

    async def leave(self: Step, *error: Any) -> None:
        if (held := getattr(self, "held", None)) is not None:
            self._record = held[1]
            publish(self, held[0])
        await leaving(self, *error)

    leaving = Step.__aexit__
    patch.setattr(Step, "publish", backwards)
    patch.setattr(Step, "__aexit__", leave)


@mutant
def an_uncommitted_changelog_is_loaded(patch: Patch) -> None:
    def consumer(self: SimulatedCluster, *_topics: str, **options: Any) -> Consumer:
        return Consumer(self, **{**options, "isolation_level": "read_uncommitted"})

    patch.setattr(SimulatedCluster, "consumer", consumer)


@mutant
def tombstones_of_the_changelog_ignored(patch: Patch) -> None:
    load = Overlay.load_changelog

    def loading(self: Overlay, codec: Any, records: Any) -> None:
        load(self, codec, [record for record in records if record.value is not None])

    patch.setattr(Overlay, "load_changelog", loading)


@mutant
def a_reader_that_begins_where_the_log_ends(patch: Patch) -> None:
    """It seeks no position, so the client takes the newest records."""
    load = Session._load

    async def loading(self: Session) -> None:
        await load(self)
        for tp, end in (await self._consumer.end_offsets(list(self.positions))).items():  # type: ignore[union-attr]
            self._consumer.seek(tp, end)  # type: ignore[union-attr]

    patch.setattr(Session, "_load", loading)


@mutant
def a_batch_that_a_rebalance_takes_back_is_forgotten(patch: Patch) -> None:
    """The fold stays with its worker and reads on behind it."""

    async def process(self: FoldRunner, records: Any) -> None:
        batch = self._batch = Batch(self.session, self.partition, records)
        await self._deliver(batch)
        await batch.finished
        self._batch = None

    patch.setattr(FoldRunner, "_process", process)


@mutant
def an_opening_that_does_not_ask_for_its_assignment(patch: Patch) -> None:
    async def at_once(_self: FoldRunner) -> None: ...

    patch.setattr(FoldRunner, "_until_assigned", at_once)


@mutant
def an_opening_that_outlasts_its_assignment(patch: Patch) -> None:
    async def wait_empty(self: Member) -> None:
        await asyncio.gather(*(runner.pause() for runner in self._runners.values()))

    patch.setattr(Member, "wait_empty", wait_empty)


@mutant
def a_fold_that_begins_a_second_step_beside_the_first(patch: Patch) -> None:
    """It reads on while the batch before is still under way."""

    async def process(self: FoldRunner, records: Any) -> None:
        await self._deliver(Batch(self.session, self.partition, records))

    patch.setattr(FoldRunner, "_process", process)


@mutant
def nobody_fences_the_former_owner(patch: Patch) -> None:
    def current(self: Broker, transactional_id: str, _epoch: int) -> Producer:
        return self.producers[transactional_id]

    patch.setattr(Broker, "_current", current)


@mutant
def misplaced_records_decided_where_they_lie(patch: Patch) -> None:
    patch.setattr(Router, "home_of", lambda _self, _topic, _key, arrived_in: arrived_in)


@mutant
def a_repeated_request_decided_again(patch: Patch) -> None:
    patch.setattr(SeenWindow, "repeated", lambda *_: False)


@mutant
def a_reservation_that_is_never_released(patch: Patch) -> None:
    patch.setattr(Account, "release", lambda _account: None)


@mutant
def an_executor_of_a_former_incarnation_keeps_its_lease(patch: Patch) -> None:
    """Its jobs never return to the queue."""
    patch.setattr(Roster, "expired", lambda *_: ())
    patch.setattr(Roster, "joined", _joined_without_ending(Roster.joined))


def _joined_without_ending(joined: Callable[..., Any]) -> Callable[..., Any]:
    def joining(self: Roster, *args: Any) -> None:
        joined(self, *args)

    return joining
