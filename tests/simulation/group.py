"""A role's consumer group: who is a member, eager rebalances, and workers that are started again after they end.

The coordinator notices a frozen or crashed member after the session timeout, never at once; a member that wakes up
after that goes on for a while with what it holds, then joins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from random import Random
from typing import Any

from aiokafka.errors import IllegalGenerationError, KafkaError, RebalanceInProgressError, UnknownMemberIdError
from aiokafka.structs import TopicPartition

from tests.simulation.member import Member
from tests.simulation.misfortunes import Faults
from tests.simulation.virtual_time import elapse

SESSION_TIMEOUT_S = 10.0
REBALANCE_TIMEOUT_S = 15.0
"""Longest wait for a member to give its partitions up: it drains for ten seconds at most."""
REJOIN_S_MAX = 3.0
"""A woken member hears that it is out with its next heartbeat."""
RESTART_S_MAX = 2.0
SKEW_S_MAX = 0.3
"""Members hear of their assignments at different times."""


class Group:
    """The members of one role. ``start`` makes a new worker process."""

    def __init__(
        self, inputs: tuple[str, ...], partitions: int, start: Callable[[], Member], random: Random, faults: Faults
    ) -> None:
        self.members: list[Member] = []
        self.failures: list[BaseException] = []
        self.rebalances = 0
        self.generation = 0
        self._inputs = inputs
        self._partitions = partitions
        self._start = start
        self._random = random
        self._faults = faults
        self._needed = asyncio.Event()
        self._forming = False

    def join(self) -> None:
        """A new worker joins."""
        member = self._start()
        member.membership.join(partial(self._heartbeat, member))
        member.process.on_freeze.append(partial(self._frozen, member))
        self.see_to(member, self._attend(member))
        self._welcome(member)

    def rebalance(self) -> None:
        """Ask for a rebalance."""
        self._needed.set()

    async def run(self) -> None:
        """Rebalance whenever it is needed."""
        while True:
            await self._needed.wait()
            self._needed.clear()
            self._forming = True
            await self._rebalanced()

    def _heartbeat(self, member: Member) -> type[KafkaError] | None:
        """The coordinator's answer to a member that asks: None if it is one, of the present generation."""
        if member not in self.members:
            return UnknownMemberIdError
        if member.membership.generation != self.generation:
            return IllegalGenerationError
        return RebalanceInProgressError if self._forming or self._needed.is_set() else None

    def _welcome(self, member: Member) -> None:
        self.members.append(member)
        self._needed.set()

    def _expel(self, member: Member) -> None:
        if member in self.members:
            self.members.remove(member)
            self._needed.set()

    def see_to(self, member: Member, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do ``work`` on a member; its failure is the worker's."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._note_failure)
        member.attention.append(task)
        return task

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    async def _attend(self, member: Member) -> None:
        """See a worker to its end, however it ends, and start another one."""
        await member.ended.wait()
        if member.failure is not None:
            self.failures.append(member.failure)
            await member.stop()
        if not member.left:
            await elapse(self._random.choice((1.0, SESSION_TIMEOUT_S)))
        self._expel(member)
        await elapse(self._random.random() * RESTART_S_MAX)
        self.join()

    def _frozen(self, member: Member) -> None:
        self.see_to(member, self._missed(member))

    async def _missed(self, member: Member) -> None:
        """Expel a member that does not wake up in time."""
        await elapse(SESSION_TIMEOUT_S)
        if member.process.frozen:
            self._faults.count("member expelled while frozen")
            self._expel(member)
            await self._rejoined(member)

    async def _rejoined(self, member: Member) -> None:
        """An expelled member is a zombie until it notices; then it joins again."""
        await member.process.awake()
        await elapse(self._random.random() * REJOIN_S_MAX)
        if not member.ended.is_set() and member not in self.members:
            self._welcome(member)

    async def _rebalanced(self) -> None:
        """Everybody stops, then everybody who is left gets a share; nobody waits until shares are taken up."""
        self.rebalances += 1
        await asyncio.gather(*(self._revoked(member) for member in list(self.members)))
        present = [member for member in self.members if not member.ended.is_set()]
        self.generation += 1
        self._forming = False
        numbers = list(range(self._partitions))
        self._random.shuffle(numbers)
        for place, member in enumerate(present):
            self.see_to(member, self._assigned(member, self.generation, sorted(numbers[place :: len(present)])))

    async def _revoked(self, member: Member) -> None:
        """Wait until the member has given its partitions up, but not for ever."""
        revoking = self.see_to(member, self._revoke(member))
        done, _ = await asyncio.wait([revoking], timeout=REBALANCE_TIMEOUT_S)
        if not done and member in self.members:
            self._faults.count("member expelled while draining")
            self._expel(member)
            self.see_to(member, self._rejoined(member))

    async def _revoke(self, member: Member) -> None:
        async with member.rebalancing:
            await member.process.awake()
            if not member.process.dead:
                await member.revoke()

    async def _assigned(self, member: Member, generation: int, numbers: list[int]) -> None:
        async with member.rebalancing:
            await elapse(self._random.random() * SKEW_S_MAX)
            await member.process.awake()
            if not member.process.dead:
                tps = [TopicPartition(topic, number) for number in numbers for topic in self._inputs]
                await member.assign(tps, generation)
