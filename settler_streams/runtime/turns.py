"""Large steps of a process take turns.

All folds of a worker share one processor, and a step computes without a pause. Were many large ones under way at once,
each answer of the broker to one of them would wait until all the others had computed, several times per transaction.
On a machine that is short of processor time, that alone outlasts the transaction's timeout: the worker fences itself.
Two at a time keep the processor busy: one computes while the other waits for the broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

LARGE_RECORDS = 500
"""From here on a step computes for longer than a transaction waits for the broker, some ten milliseconds."""
LARGE_STEPS_MAX = 2
"""One that computes, one that waits."""

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


@asynccontextmanager
async def turn(records: int) -> AsyncIterator[None]:
    """Hold a turn for a step of so many records; small steps need none. It is bounded by the holders' own deadlines."""
    if records < LARGE_RECORDS:
        yield
        return
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = asyncio.Semaphore(LARGE_STEPS_MAX)
    async with turns:
        yield
