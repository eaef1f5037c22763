"""A worker process of one role: the real sessions, runners, steps and agent, over a simulated consumer.

Taking folds over and giving them back is the transport driver's own code, borrowed method by method; what Faust and
aiokafka do around it (fetching, the agent's channel, the process that ends after a failure) is played here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aiokafka.errors import NoOffsetForPartitionError
from aiokafka.structs import TopicPartition

from settler_streams.runtime.batch import Batch
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.step import Records
from settler_streams.runtime.transport import Consumer
from settler_streams.workers.folds import FOLDS
from tests.simulation.clients import SimulatedCluster
from tests.simulation.network import Process
from tests.simulation.partitions import READ_COMMITTED
from tests.simulation.virtual_time import elapse

if TYPE_CHECKING:
    from tests.simulation.broker import Broker
    from tests.simulation.network import Network

BATCH_RECORDS_MAX = 12
"""Records of one input in one batch at most; mostly fewer, so that a seed has many steps."""
PATIENCE = 5
"""An idle fetch lasts so many times longer than it was asked to: it spares most of an idle fold's turns."""
AGENT_DELAY_S_MAX = 0.03

Report = Callable[[str], None]


class Member:
    """One worker. ``failure`` is what it could not go on after; ``left`` says that it took its leave; ``report`` takes
    what must never happen."""

    assign_folds = Consumer.assign_folds
    wait_empty = Consumer.wait_empty
    open_folds = Consumer.open_folds
    _partitions_of = Consumer._partitions_of
    _drop = Consumer._drop
    _on_runner_done = Consumer._on_runner_done

    def __init__(self, role: str, process: Process, network: Network, broker: Broker, spec: FoldSpec, report: Report):
        self.process = process
        self.assigned: list[TopicPartition] = []
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
            fail=self.fail,
        )
        self._spec = spec
        self._network = network
        self._broker = broker
        self._report = report
        self._runners: dict[int, Any] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._generation = 0
        self._channel: asyncio.Queue[Batch] = asyncio.Queue(maxsize=64)
        for _ in range(spec.topology.fold_partitions(role)):
            process.spawn(self._work(FOLDS[role].agent))
        process.on_crash.append(self._crashed)

    def _new_session(self, partition: int) -> Session:
        return Session(self._spec, partition)

    def fail(self, error: BaseException) -> None:
        """The worker has to stop, as a process with this exit reason would."""
        if self.failure is None and not self.process.dead:
            self.failure = error
            self.ended.set()

    def _crashed(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self.ended.set()

    async def revoke(self) -> None:
        """A rebalance begins: end what is under way; the consumer forgets where it stood."""
        await self.wait_empty()
        self._generation += 1
        self._positions = {}

    async def assign(self, tps: list[TopicPartition]) -> None:
        """A rebalance ends."""
        self._generation += 1
        self._positions = {}
        self.assigned = tps
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

    async def seek(self, positions: Mapping[TopicPartition, int]) -> None:
        """The runner says where its session stands."""
        generation = self._generation
        await elapse(self._network.latency_s())
        await self.process.gate()
        if generation == self._generation:
            self._positions.update(positions)

    async def fetch(self, tps: frozenset[TopicPartition], wait_s: float) -> Records:
        """What has arrived: some of it, of some of the inputs, in any order of the inputs."""
        generation, wanted = self._generation, sorted(tps)
        await self.process.gate()
        for tp in wanted:
            if tp not in self._positions:
                self._positions[tp] = self._committed(tp)
        deadline_s = asyncio.get_running_loop().time() + PATIENCE * wait_s
        while generation == self._generation and not self._behind(wanted):
            if (left_s := deadline_s - asyncio.get_running_loop().time()) <= 0:
                return {}
            await self._broker.until_changed(wanted, left_s)
        await elapse(self._network.latency_s())
        await self.process.gate()
        if generation != self._generation:
            return {}
        return self._taken(wanted)

    def _behind(self, tps: list[TopicPartition]) -> bool:
        return any(self._broker.partition(tp).has_records(self._positions[tp]) for tp in tps)

    def _committed(self, tp: TopicPartition) -> int:
        committed = self._broker.offsets.get((self.app.conf.id, tp))
        if committed is None:
            raise NoOffsetForPartitionError(tp)
        return committed

    def _taken(self, tps: list[TopicPartition]) -> Records:
        random = self._network.random
        random.shuffle(tps)
        found = {}
        for tp in tps:
            if random.random() < 0.8:
                most = random.randint(1, BATCH_RECORDS_MAX)
                records, self._positions[tp] = self._broker.partition(tp).read(
                    self._positions[tp], READ_COMMITTED, most
                )
                if records:
                    found[tp] = records
        return found

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
    return Member(role, process, network, broker, spec, report)
