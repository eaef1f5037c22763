"""A thousand small disasters: the real sessions, steps, runners and decisions on an in-memory broker, seed by seed.

``SIMULATION_SEEDS`` sets how many seeds run, ``SIMULATION_FIRST_SEED`` where they begin. A seed that fails is printed
with the command that replays it, to the byte.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from settler_streams.runtime.session import Session
from tests.simulation.judge import violations_of
from tests.simulation.many_seeds import Tally, tallies
from tests.simulation.member import GIVEN_UP, HELD_BACK
from tests.simulation.misfortunes import Fate
from tests.simulation.virtual_time import run
from tests.simulation.world import World, simulate

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "1000"))
FIRST_SEED = int(os.environ.get("SIMULATION_FIRST_SEED", "0"))
VIOLATIONS_SHOWN = 10
SEEDS_THAT_MEET_EVERYTHING = 500
AWAITED = ("heartbeat", "init", "load", "fetch", "produce", "offsets", "commit")
"""The requests of an opening, of reading and of a step; each must meet death and sleep, before it and after it."""
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(120 + SEEDS)
def test_every_guarantee_holds_under_every_seed(record_property: Callable[[str, object], None]) -> None:
    met, began_s = Tally(), time.perf_counter()
    for tally in tallies(range(FIRST_SEED, FIRST_SEED + SEEDS)):
        met.add(tally)
        if met.failed is not None:
            pytest.fail(told(*met.failed), pytrace=False)
    injected, struck = met.injected, met.struck
    record_property("seeds_per_second", round(SEEDS / (time.perf_counter() - began_s), 1))
    record_property("virtual_hours", round(met.virtual_s / 3600, 1))
    record_property("faults", dict(injected.most_common()))
    if SEEDS >= SEEDS_THAT_MEET_EVERYTHING:
        assert [event for event in (HELD_BACK, GIVEN_UP) if injected[event] == 0] == [], "an opening nobody disturbs"
        assert [fate.value for fate in Fate if injected[fate.value] == 0] == [], "a fault that is never injected"
        lethal = itertools.product(
            AWAITED, (Fate.CRASH_BEFORE, Fate.CRASH_AFTER, Fate.FREEZE_BEFORE, Fate.FREEZE_AFTER)
        )
        assert [where for where in lethal if struck[where] == 0] == [], "an await at which nobody ever dies or sleeps"


def told(seed: int, found: list[str]) -> str:
    """What went wrong, and how to see it again."""
    lines = [f"seed {seed} violates {len(found)} guarantees:", *found[:VIOLATIONS_SHOWN]]
    return "\n  ".join([*lines, f"replay it: {replay_command(seed)}"])


def replay_command(seed: int) -> str:
    """The command that runs this seed alone."""
    chosen = f"SIMULATION_FIRST_SEED={seed} SIMULATION_SEEDS=1"
    return f"{chosen} make test PYTEST_ARGS=tests/simulation/test_simulation.py"


def test_a_seed_repeats_itself_in_another_process() -> None:
    """Nothing in it hangs on an address, a hash, the clock or the machine's own chance."""
    script = "from tests.simulation.world import simulate; print(simulate(3).broker.digest())"
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    printed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout
    assert printed.split()[-1] == simulate(3).broker.digest()


def test_seeds_differ() -> None:
    assert len({simulate(seed).broker.digest() for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(12))
def test_an_input_that_is_made_again_stops_its_folds_for_good(seed: int) -> None:
    """After the storm a topic is deleted and made again, with more records in it than the old one ever had."""
    errors, decided = run(made_again(World(seed)))
    assert decided == 0, "a fold has decided on records of another topic"
    assert [error for error in errors if "was re-created" in error], errors


def test_an_input_that_is_made_again_would_be_read_by_who_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    async def without_looking(self: Session, client: Any, _stored: object) -> None:
        await check_topics(self, client, {})

    check_topics = Session._check_topics
    monkeypatch.setattr(Session, "_check_topics", without_looking)
    assert any(run(made_again(World(seed)))[1] > 0 for seed in range(12))


async def made_again(world: World) -> tuple[list[str], int]:
    """What admission's workers ended with after that, and how many records they have still written."""
    await world.live()
    assert violations_of(world) == []
    before = world.written_by("admission", except_in="job-requests")
    errors = await world.recreate("job-requests", "admission")
    world.end()
    return errors, world.written_by("admission", except_in="job-requests") - before
