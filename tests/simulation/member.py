"""A worker process of one role: the real sessions, runners, steps and agent, over a simulated consumer.

Taking folds over, giving them back and asking for them is the transport driver's own code, borrowed method by method;
what Faust and aiokafka do around it (the agent's channel, the process that ends after a failure) is played here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiokafka.structs import TopicPartition

from settler_streams.runtime.batch import Batch
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.transport import Consumer
from settler_streams.workers.folds import FOLDS
from tests.simulation.clients import SimulatedCluster
from tests.simulation.membership import Membership
from tests.simulation.network import Process
from tests.simulation.virtual_time import elapse

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.network import Network

AGENT_DELAY_S_MAX = 0.03

HELD_BACK = "opening held back: not assigned"
GIVEN_UP = "opening given up for a rebalance"

Report = Callable[[str], None]


class Member:
    """One worker. ``failure`` is what it could not go on after; ``left`` says that it took its leave; ``report`` takes
    what must never happen."""

    assign_folds = Consumer.assign_folds
    wait_empty = Consumer.wait_empty
    open_folds = Consumer.open_folds
    open_states = Consumer.open_states
    standings = Consumer.standings
    _partitions_of = Consumer._partitions_of
    _drop = Consumer._drop
    _on_runner_done = Consumer._on_runner_done

    def __init__(self, role: str, process: Process, network: Network, spec: FoldSpec, report: Report):
        self.process = process
        self.membership = Membership(spec.cluster)  # type: ignore[arg-type]
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()
        self.left = False
        self.rebalancing = asyncio.Lock()
        self._stopping = asyncio.Lock()
        self.attention: list[asyncio.Task[None]] = []
        self.app = SimpleNamespace(
            role=role,
            conf=SimpleNamespace(id=spec.fold_id(0).group),
            input_topics=tuple(spec.topic(name) for name in spec.declared.inputs),
            new_session=self._new_session,
            gather_s=spec.declared.gather_ms / 1000,
            fail=self.fail,
        )
        self._spec = spec
        self._network = network
        self._report = report
        self._runners: dict[int, Any] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._thread = SimpleNamespace(in_thread=lambda work: work(self.membership))
        self._granted: set[int] = set()
        self._channel: asyncio.Queue[Batch] = asyncio.Queue(maxsize=64)
        for _ in range(spec.topology.fold_partitions(role)):
            process.spawn(self._work(FOLDS[role].agent))
        process.on_crash.append(self._crashed)

    def _new_session(self, partition: int) -> Session:
        return AskingSession(self._spec, partition, self._check_granted)

    _is_assigned = Consumer._is_assigned

    async def is_assigned(self, partition: int) -> bool:
        """What the driver is told; it must ask again before each opening."""
        granted = await Consumer.is_assigned(self, partition)  # type: ignore[arg-type]
        if granted:
            self._granted.add(partition)
        else:
            self._network.faults.count(HELD_BACK)
        return granted

    def _check_granted(self, partition: int) -> None:
        if partition not in self._granted:
            self._report("a fold is opened without asking whether it is still assigned")
        self._granted.discard(partition)

    def fail(self, error: BaseException) -> None:
        """The worker has to stop, as a process with this exit reason would."""
        if self.failure is None and not self.process.dead:
            self.failure = error
            self.ended.set()

    def _crashed(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self.ended.set()

    def lags(self, broker: Broker) -> bool:
        """Whether Kafka has committed what one of the sessions does not know yet."""
        group = self.app.conf.id
        positions = [at for runner in self._runners.values() for at in runner.session.positions.items()]
        return any(broker.offsets.get((group, tp), position) != position for tp, position in positions)

    def opening_folds(self) -> set[int]:
        """The folds that it has been assigned and has not opened yet."""
        return self._runners.keys() - set(self.open_folds())

    async def revoke(self) -> None:
        """A rebalance begins: end what is under way. What goes on opening could fence the fold's next owner."""
        opening = sum(runner.session.opening for runner in self._runners.values())
        await self.wait_empty()
        self._network.faults.count(GIVEN_UP, opening)
        if not all(runner.session.taken for runner in self._runners.values()):
            self._report("a fold that was not taken in time outlasts its assignment")

    async def assign(self, tps: list[TopicPartition], generation: int) -> None:
        """A rebalance ends."""
        self.membership.assigned(tps, generation)
        await self.assign_folds(tps)

    async def stop(self) -> None:
        """SIGTERM, or the end after a failure: drain, give the folds back, end the process. The first call does it."""
        async with self._stopping:
            if self.left:
                return
            await self.wait_empty()
            await asyncio.gather(*(self._drop(partition) for partition in list(self._runners)))
            self.left = True
            self.process.crash()

    async def _deliver(self, batch: Batch) -> None:
        await self.process.gate()
        await self._channel.put(batch)

    async def _work(self, agent: Callable[[Any], Any]) -> None:
        """One agent, as Faust runs it: what it cannot handle ends the worker."""
        watched = Watched(self._report)
        try:
            await agent(self._batches(watched))
        except Exception as error:  # noqa: BLE001 - whatever it is, the worker reports it and stops
            watched.check_failed_step()
            self.fail(error)

    async def _batches(self, watched: Watched) -> AsyncIterator[Batch]:
        while True:
            batch = await self._channel.get()
            await elapse(self._network.random.random() * AGENT_DELAY_S_MAX)
            await self.process.gate()
            watched.begin(batch)
            yield batch


class AskingSession(Session):
    """A session that says when it begins to open. ``opening``: it has begun, and has not taken its fold yet."""

    def __init__(self, spec: FoldSpec, partition: int, began: Callable[[int], None]) -> None:
        super().__init__(spec, partition)
        self._began = began
        self._has_begun = False

    @property
    def opening(self) -> bool:
        return self._has_begun and not self.taken

    async def open(self) -> None:
        self._began(self.id.partition)
        self._has_begun = True
        await super().open()


class Watched:
    """Holds what a session believes to be committed against what it believed before a step that failed."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._session: Any = None
        self._before: Any = None

    def begin(self, batch: Batch) -> None:
        """A step is about to begin."""
        self._session = batch._session
        self._before = self._belief()

    def check_failed_step(self) -> None:
        """It has failed: nothing of it may stand in the session, which must not be used again."""
        if not self._session.lost:
            self._report("a session outlives a failed step")
        if self._belief() != self._before:
            self._report("a failed step has left traces in its session")

    def _belief(self) -> Any:
        session = self._session
        return dict(session.state), dict(session.positions), session.now_ms


def member_of(role: str, process: Process, network: Network, broker: Broker, spec: FoldSpec, report: Report) -> Member:
    """A worker whose sessions reach the broker from ``process``."""
    spec = replace(spec, cluster=SimulatedCluster(broker, network, process))  # type: ignore[arg-type]
    return Member(role, process, network, spec, report)
