"""Reading a fold's inputs at the edges of their logs, on the in-memory broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from aiokafka.structs import TopicPartition

from settler_streams.errors import FencedError, StateError, UnavailableError
from settler_streams.runtime.session import Session
from tests.simulation.virtual_time import elapse, run
from tests.simulation.world import DEPLOYMENT, World

INPUT = TopicPartition(f"{DEPLOYMENT}.usage-events", 0)
CHANGELOG = TopicPartition(f"{DEPLOYMENT}.admission-changelog", 0)
RECORDS = 8


async def opened(world: World) -> Session:
    """An open session of the same fold in a process of its own."""
    session = world.new_worker("admission").app.new_session(0)
    session._began = lambda _partition: None
    await session.open()
    return session


async def folded(session: Session) -> None:
    """Consume all that lies in the input."""
    while session.positions[INPUT] < RECORDS:
        if records := await session.fetch(1.0):
            async with session.new_step(records) as step:
                step.fold(session.logic)


def played(play: Callable[[World], Awaitable[None]]) -> None:
    """Play on a broker with some bad records, without faults."""

    async def program() -> None:
        world = World(0)
        world.faults.raging = False
        world.create_topics()
        for number in range(RECORDS):
            world.broker.append(INPUT.topic, 0, b"k", b"%d" % number)
        await play(world)

    run(program())


def test_a_log_that_was_cut_in_front_of_its_only_reader_stops_it_for_good() -> None:
    async def play(world: World) -> None:
        session = await opened(world)
        world.broker.partition(INPUT).delete_before(RECORDS)
        with pytest.raises(StateError, match="does not hold"):
            await session.fetch(1.0)

    played(play)


def test_a_zombie_behind_which_the_log_was_cut_is_fenced_and_raises_no_false_alarm() -> None:
    async def play(world: World) -> None:
        zombie, owner = await opened(world), await opened(world)
        await folded(owner)
        world.broker.partition(INPUT).delete_before(RECORDS)
        with pytest.raises(FencedError):
            await zombie.fetch(1.0)

    played(play)


def test_an_input_that_is_gone_ends_its_reader() -> None:
    async def play(world: World) -> None:
        session = await opened(world)
        await folded(session)
        del world.broker.topics[INPUT.topic]
        with pytest.raises(UnavailableError, match="is gone"):
            await session.fetch(1.0)

    played(play)


def test_what_a_broker_does_not_show_yet_is_waited_for_and_not_decided_again() -> None:
    """Frozen beyond its session, a broker shows less than it holds until something is appended."""

    async def play(world: World) -> None:
        first = await opened(world)
        await folded(first)
        await first.close()
        changelog = world.broker.partition(CHANGELOG)
        while changelog.stable_end < changelog.end:
            await elapse(0.1)  # the markers are still on their way
        changelog.hidden_from = 0
        world.broker.offsets.clear()  # the coordinator's memory is as old as that
        second = await opened(world)
        assert second.positions[INPUT] == RECORDS
        assert second.now_ms == first.now_ms

    played(play)
