"""Waiting: until a fact is observed, or for the time that the seed has given to a fault."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

LOOK_INTERVAL_S = 0.2
"""How often a fact is looked at: short beside any recovery, and cheap."""


class NotObservedError(Exception):
    """A fact that had to come about has not, within its deadline."""


async def elapse(seconds: float, stop: asyncio.Event | None = None) -> bool:
    """Let time pass, or less once ``stop`` is set; returns whether it is."""
    stop = stop or asyncio.Event()
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return False
    return True


async def observe(
    what: str, holds: Callable[[], Awaitable[bool]], deadline_s: float, missing: Callable[[], object] = str
) -> float:
    """Wait until ``holds``; returns the seconds that it took. ``missing`` says what is not there when it does not.

    Raises:
        NotObservedError: it does not hold after ``deadline_s``.
    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not await holds():
        if loop.time() - began_s > deadline_s:
            raise NotObservedError(f"{what}: not within {deadline_s:.0f} s; {missing()}")
        await elapse(LOOK_INTERVAL_S)
    return loop.time() - began_s


async def observe_advance(
    what: str, left: Callable[[], Awaitable[int]], deadline_s: float, missing: Callable[[], object] = str
) -> None:
    """Wait until nothing is ``left``, for as long as it grows less: a slow machine is no fault, standing still is.

    Raises:
        NotObservedError: it has not grown less for ``deadline_s``.
    """
    loop = asyncio.get_running_loop()
    least, since_s = await left(), loop.time()
    while least:
        await elapse(LOOK_INTERVAL_S)
        now = await left()
        if now < least:
            least, since_s = now, loop.time()
        elif loop.time() - since_s > deadline_s:
            raise NotObservedError(f"{what}: {least} left, no fewer for {deadline_s:.0f} s; {missing()}")
