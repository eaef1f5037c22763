"""Processes, and the way of their requests to the broker and back: latency, faults, crashes, and long sleeps.

A crashed process sends nothing more, not even from its ``finally`` blocks, and never hears an answer; what it had sent
arrives. A frozen one stops at its next request or answer, while the rest of the world goes on, and then goes on itself
as if nothing had happened: a zombie.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, TypeVar

from aiokafka.errors import ConcurrentTransactions, KafkaConnectionError, KafkaError, MessageSizeTooLargeError

from tests.simulation.misfortunes import Fate, Faults
from tests.simulation.virtual_time import elapse

T = TypeVar("T")

LATENCY_S_MAX = 0.02
BACKOFF_S = 0.02
SLOW_ANSWERS = 0.3
"""How many answers take noticeable time; what matters is that some do."""
FROZEN_S_MAX = 25.0
"""Far longer than a session timeout and a transaction timeout."""
SLOW_S_MAX = 14.0
FOREVER_S = 10_000.0


class Process:
    """One operating system process. ``on_crash`` is called once, when it dies; ``on_freeze`` whenever it is stopped."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.on_crash: list[Callable[[], None]] = []
        self.on_freeze: list[Callable[[], None]] = []
        self._thawed = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` until it ends or the process dies. An error that nobody awaits is no news."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_noticed)
        self._tasks.append(task)
        if self.dead:
            task.cancel()
        return task

    def crash(self) -> None:
        """SIGKILL."""
        if self.dead:
            return
        self.dead = True
        self._thawed.set()
        for task in self._tasks:
            task.cancel()
        for callback in self.on_crash:
            callback()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after ``seconds``."""
        if not self.frozen:
            self.frozen = True
            self._thawed.clear()
            asyncio.get_running_loop().call_later(seconds, self.thaw)
            for callback in self.on_freeze:
                callback()

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        self._thawed.set()

    async def awake(self) -> None:
        """Return when the process is not frozen: it runs, or it is dead."""
        while self.frozen and not self.dead:
            await self._thawed.wait()

    async def gate(self) -> None:
        """Pass if the process runs.

        Raises:
            KafkaConnectionError: it is dead; whatever still runs of it reaches nobody.
        """
        await self.awake()
        if self.dead:
            raise KafkaConnectionError(f"{self.name} is dead")


class Network:
    """Carries requests. All chance in it comes from ``random``."""

    def __init__(self, random: Random, faults: Faults) -> None:
        self.random = random
        self.faults = faults

    def latency_s(self) -> float:
        """One way."""
        return self.random.random() * LATENCY_S_MAX

    async def request(self, process: Process, kind: str, effect: Callable[[], T]) -> T:
        """Let ``effect`` happen at the broker and bring its answer; retriable errors are retried, as aiokafka does."""
        await process.gate()
        fate = self.faults.fate(kind)
        underway_s = await self._depart(process, fate)
        while True:
            try:
                answer = await self._arrival(underway_s + self.latency_s(), effect)
                break
            except ConcurrentTransactions:
                await elapse(BACKOFF_S)
                await process.gate()
        await self._return(process, fate)
        await process.gate()
        return answer

    def _arrival(self, delay_s: float, effect: Callable[[], T]) -> asyncio.Future[T]:
        """The request is on the wire: it arrives, whether or not its sender lives to hear the answer."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        loop.call_later(delay_s, _arrive, effect, answer)
        return answer

    async def _depart(self, process: Process, fate: Fate | None) -> float:
        """What happens to the request before it is on the wire; returns how long it is held up there."""
        random = self.random
        match fate:
            case Fate.CRASH_BEFORE:
                process.crash()
                await process.gate()
            case Fate.FREEZE_BEFORE:
                process.freeze(random.uniform(1.0, FROZEN_S_MAX))
                await process.gate()
            case Fate.REFUSED:
                await elapse(self.latency_s())
                raise MessageSizeTooLargeError("refused by the simulation")
            case Fate.FAILED:
                raise KafkaError("the broker was shut down in the middle")
            case Fate.RETRIED:
                await elapse(BACKOFF_S * random.randint(1, 5))
            case Fate.LOST_REQUEST:
                await elapse(FOREVER_S)
            case Fate.LATE_REQUEST:
                return random.uniform(20.0, 45.0)
        return 0.0

    async def _return(self, process: Process, fate: Fate | None) -> None:
        """What happens to the answer."""
        match fate:
            case Fate.CRASH_AFTER:
                process.crash()
            case Fate.FREEZE_AFTER:
                process.freeze(self.random.uniform(1.0, FROZEN_S_MAX))
            case Fate.SLOW:
                await elapse(self.random.uniform(0.1, SLOW_S_MAX))
            case Fate.LOST_ANSWER:
                await elapse(FOREVER_S)
            case _ if self.random.random() < SLOW_ANSWERS:
                await elapse(self.latency_s())


def _noticed(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _arrive(effect: Callable[[], T], answer: asyncio.Future[T]) -> None:
    try:
        result = effect()
    except KafkaError as error:
        if not answer.done():
            answer.set_exception(error)
    else:
        if not answer.done():
            answer.set_result(result)
