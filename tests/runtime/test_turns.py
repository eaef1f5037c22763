"""Large steps take turns, small ones pass them by."""

from __future__ import annotations

import asyncio

from settler_streams.runtime.turns import LARGE_RECORDS, LARGE_STEPS_MAX, turn


class Steps:
    """Steps that hold on until they are let go."""

    def __init__(self) -> None:
        self.under_way: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def begin(self, name: str, records: int) -> None:
        """Ask for a turn, and let everything happen that can."""

        async def step() -> None:
            async with turn(records):
                self.under_way.append(name)
                await self._ends[name].wait()
                self.under_way.remove(name)

        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(step())
        await settled()

    async def end(self, name: str) -> None:
        """Let one go."""
        self._ends[name].set()
        await self.tasks[name]
        await settled()


async def settled() -> None:
    """Nothing here waits for the outside, so a few rounds of the loop are all there is."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_large_steps_take_turns_and_small_ones_do_not_wait() -> None:
    steps = Steps()
    for name in ("a", "b", "c"):
        await steps.begin(name, LARGE_RECORDS)
    assert steps.under_way == ["a", "b"]
    assert len(steps.under_way) == LARGE_STEPS_MAX
    await steps.begin("small", LARGE_RECORDS - 1)
    assert steps.under_way == ["a", "b", "small"]
    await steps.end("a")
    assert steps.under_way == ["b", "small", "c"]
    for name in ("b", "c", "small"):
        await steps.end(name)


async def test_one_that_is_given_up_leaves_its_turn_to_the_next() -> None:
    steps = Steps()
    for name in ("a", "b", "waits", "next"):
        await steps.begin(name, LARGE_RECORDS)
    for name in ("waits", "a"):
        steps.tasks[name].cancel()
        await asyncio.wait([steps.tasks[name]])
    await settled()
    assert "next" in steps.under_way
    for name in ("b", "next"):
        await steps.end(name)
