"""An event loop whose clock jumps to the next timer: hours pass in milliseconds, and equal programs run equally."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Every task waits for another one, and no timer is set: nothing can ever happen again."""


class _Selector:
    """Stands where the loop asks the operating system for events; there are none, so it lets the time pass."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("nothing is left that could happen")
        self._loop.now_s += timeout
        return []

    def close(self) -> None:
        """There is nothing to close."""


class VirtualTimeLoop(asyncio.BaseEventLoop):
    """Tasks, timers and timeouts of asyncio over a clock of our own. It knows no sockets and no threads."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._selector = _Selector(self)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self.now_s

    def _process_events(self, _events: list[Any]) -> None:
        """No events come from outside."""

    def _write_to_self(self) -> None:
        """Nobody wakes the loop from outside."""


def run(program: Coroutine[Any, Any, T]) -> T:
    """Run ``program`` to its end in virtual time; whatever it leaves running is cancelled."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(program)


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
