"""An event loop whose clock jumps to the next timer: hours pass in milliseconds, and equal programs run equally."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from heapq import heappop
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Every task waits for another one, and no timer is set: nothing can ever happen again."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Tasks, timers and timeouts of asyncio over a clock of our own. It knows no sockets and no threads."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self.now_s

    def _run_once(self) -> None:
        """What asyncio's loop does, except that it never waits: when nobody is ready, the next timer's time has come.

        An exception in a callback ends the simulation; asyncio would only log it.
        """
        ready = self._ready
        if not ready and not self._stopping:
            self._jump()
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._context.run(handle._callback, *handle._args)

    def _jump(self) -> None:
        scheduled = self._scheduled
        while scheduled and scheduled[0]._cancelled:
            heappop(scheduled)._scheduled = False
        if not scheduled:
            raise DeadlockError("nothing is left that could happen")
        self.now_s = scheduled[0]._when
        while scheduled and scheduled[0]._when <= self.now_s:
            timer = heappop(scheduled)
            timer._scheduled = False
            self._ready.append(timer)

    def _process_events(self, _events: list[Any]) -> None:
        """No events come from outside."""

    def _write_to_self(self) -> None:
        """Nobody wakes the loop from outside."""


def run(program: Coroutine[Any, Any, T]) -> T:
    """Run ``program`` to its end in virtual time; whatever it leaves running is cancelled.

    Python's cycle collector would look through everything again and again; it is off meanwhile.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(program)
    finally:
        if collecting:
            gc.enable()


async def elapse(seconds: float) -> None:
    """Let virtual time pass."""
    loop = asyncio.get_running_loop()
    passed = loop.create_future()
    timer = loop.call_later(seconds, _resolve, passed)
    try:
        await passed
    finally:
        timer.cancel()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
