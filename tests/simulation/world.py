"""One seed from beginning to end: a storm of work and faults, then calm until everything has drained.

What has happened is judged afterwards, by :mod:`tests.simulation.judge`, from the log alone; what the workers
themselves report as impossible is collected in ``violations``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.errors import FencedError, UnavailableError
from settler_streams.events import ClockTick, encode, envelope
from settler_streams.ids import PLATFORM
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import FoldSpec
from settler_streams.topology import Topology, load_topology
from settler_streams.workers.folds import FOLDS
from tests.simulation.broker import Broker
from tests.simulation.executors import Executor
from tests.simulation.faults import Faults
from tests.simulation.group import Group
from tests.simulation.member import Member, member_of
from tests.simulation.network import FROZEN_S_MAX, Network, Process
from tests.simulation.virtual_time import elapse, run
from tests.simulation.workload import MESSAGE_BYTES_MAX, PARTITIONS, STORM_S, Author

DEPLOYMENT = "sim"
DRAINED_S_MAX = 240.0
"""Leases of ten seconds, five attempts, and whatever still hangs when the storm ends: three minutes are ample."""
TICK_S = 4.0
"""Slower than the real ticker, to spend the time on other records; leases and windows are far longer."""
CHECK_S = 1.0
BROKER_BYTES_MAX = 2**20
"""The broker weighs batches: those of a step are up to half of this."""

EXPECTED = (FencedError, UnavailableError, KafkaError)
"""What a worker may end with when the broker fails it or another owner has taken over; anything else is a bug."""


def small_topology() -> Topology:
    """The real topology with two partitions and small messages."""
    declared = load_topology()
    topics = tuple(
        topic.model_copy(update={"max_message_bytes": MESSAGE_BYTES_MAX}) if topic.events else topic
        for topic in declared.topics
    )
    return declared.model_copy(update={"tenant_partitions": PARTITIONS, "worker_pools": 1, "topics": topics})


TOPOLOGY = small_topology()


@dataclass
class World:
    """Everything of one seed. ``roles`` are those that run in it."""

    seed: int
    violations: list[str] = field(default_factory=list)
    crashes: list[BaseException] = field(default_factory=list)
    virtual_s: float = 0.0

    def __post_init__(self) -> None:
        self.random = Random(f"{self.seed}/world")  # noqa: S311 - repeatable on purpose
        self.faults = Faults(Random(f"{self.seed}/faults"))  # noqa: S311
        self.network = Network(Random(f"{self.seed}/network"), self.faults)  # noqa: S311
        self.broker = Broker(marker_delay_s=lambda: self.network.random.random() * 0.05)
        self.roles = ["admission", "scheduler"]
        if self.seed % 4 == 0:
            self.roles.append("flags")
        if self.seed % 8 == 1:
            self.roles += ["noisy-neighbour", "noisy-detector"]
        self.groups: dict[str, Group] = {}
        self.executors: list[Executor] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._processes = 0
        self._ticks = 0

    def name(self, topic: str) -> str:
        """A topic's full name."""
        return f"{DEPLOYMENT}.{topic}"

    async def live(self) -> World:
        """Run the seed."""
        for declared in TOPOLOGY.declared(DEPLOYMENT):
            self.broker.create_topic(declared.topic, declared.partitions, BROKER_BYTES_MAX)
        for role in self.roles:
            self._found(role)
        for number in range(2):
            executor = Executor(f"executor-{number}", DEPLOYMENT, self.broker, self.random, self.faults)
            self.executors.append(executor)
            self._spawn(executor.run())
        self._spawn(self._tick())
        self._spawn(self._produce())
        self._spawn(self._storm())
        await elapse(STORM_S)
        self._calm()
        await self._until(self._all_jobs_have_ended, "jobs never end")
        for task in self._tasks:
            task.cancel()
        for executor in self.executors:
            executor.stop()
        await self._until(self._all_is_consumed, "inputs are never consumed")
        self.crashes = [error for group in self.groups.values() for error in group.failures]
        self.violations += [f"a worker ended with {e!r}" for e in self.crashes if not isinstance(e, EXPECTED)]
        self.virtual_s = asyncio.get_running_loop().time()
        return self

    def _found(self, role: str) -> None:
        """A role's group, and its first workers."""
        declared = TOPOLOGY.fold(role)
        inputs = tuple(self.name(topic) for topic in declared.inputs)
        partitions = TOPOLOGY.fold_partitions(role)
        group = Group(inputs, partitions, partial(self._worker, role), self.random, self.faults)
        self.groups[role] = group
        for _ in range(2 if role in ("admission", "scheduler") else 1):
            group.join()
        asyncio.get_running_loop().create_task(group.run()).add_done_callback(self._group_ended)

    def _group_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.violations.append(f"a rebalance failed: {task.exception()!r}")

    def _worker(self, role: str) -> Member:
        self._processes += 1
        process = Process(f"{role}-{self._processes}")
        fold = FOLDS[role]
        spec = FoldSpec(
            declared=TOPOLOGY.fold(role),
            topology=TOPOLOGY,
            cluster=None,  # type: ignore[arg-type]
            deployment=DEPLOYMENT,
            kinds=fold.kinds,
            new_logic=lambda state, partition: fold.new_logic(state, partition, TOPOLOGY),
            router=ROUTER,
        )
        return member_of(role, process, self.network, self.broker, spec, self.violations.append)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        return task

    async def _produce(self) -> None:
        """Producers write what the seed has laid down."""
        loop = asyncio.get_running_loop()
        for write in Author(Random(f"{self.seed}/workload")).writes():  # noqa: S311
            if write.at_s > loop.time():
                await elapse(write.at_s - loop.time())
            if write.fault is not None:
                self.faults.count(write.fault)
            self.broker.append(self.name(write.topic), write.partition, write.key, write.value)

    async def _tick(self) -> None:
        """Time as records, for every role that asks for it."""
        while True:
            await elapse(TICK_S)
            for role, topic in ((role, TOPOLOGY.fold(role).tick) for role in self.roles):
                if topic is not None:
                    for partition in range(TOPOLOGY.fold_partitions(role)):
                        self.broker.append(self.name(topic), partition, None, self._tick_value(role))

    def _tick_value(self, role: str) -> bytes:
        self._ticks += 1
        tick = ClockTick(role=role, sequence=self._ticks)
        time = dt.datetime.fromtimestamp(self.broker.now_ms / 1000, dt.UTC)
        event_id = f"90000000-0000-7000-8000-{self._ticks:012x}"
        return encode(envelope(tick, event_id=event_id, source=f"/ticker/{role}", tenant=PLATFORM, time=time))

    async def _storm(self) -> None:
        """What befalls whole processes and topics, beside the faults of single requests."""
        happenings = (self._restart, self._freeze, self._kill, self._shuffle, self._compact, self._retain)
        while True:
            await elapse(self.random.random() * 4)
            self.random.choice(happenings)(self.random.choice(list(self.groups)))

    def _member(self, role: str) -> Member | None:
        members = [member for member in self.groups[role].members if not member.ended.is_set()]
        return self.random.choice(members) if members else None

    def _restart(self, role: str) -> None:
        if (member := self._member(role)) is not None and not member.process.frozen:
            self.faults.count("worker restarted")
            self._spawn(member.stop())

    def _freeze(self, role: str) -> None:
        if (member := self._member(role)) is not None:
            self.faults.count("worker frozen at any moment")
            member.process.freeze(self.random.uniform(1, FROZEN_S_MAX))

    def _kill(self, role: str) -> None:
        if (member := self._member(role)) is not None:
            self.faults.count("worker killed at any moment")
            member.process.crash()

    def _shuffle(self, role: str) -> None:
        self.faults.count("rebalances", 3)
        for _ in range(3):
            asyncio.get_running_loop().call_later(self.random.random(), self.groups[role].rebalance)

    def _compact(self, role: str) -> None:
        self.faults.count("changelog compacted")
        for partition in self.broker.topics[self.name(TOPOLOGY.fold(role).changelog)].partitions:
            partition.compact()

    def _retain(self, role: str) -> None:
        """Retention takes what its reader has consumed, as far as every reader has."""
        for topic in TOPOLOGY.fold(role).inputs:
            readers = [fold.role for fold in TOPOLOGY.folds if topic in fold.inputs and fold.role in self.roles]
            for partition in self.broker.topics[self.name(topic)].partitions:
                groups = [f"{DEPLOYMENT}.{reader}" for reader in readers]
                partition.delete_before(min(self.broker.offsets.get((group, partition.tp), 0) for group in groups))
        self.faults.count("inputs cut by retention")

    def _calm(self) -> None:
        """No more faults; whoever sleeps wakes up."""
        self.faults.raging = False
        for group in self.groups.values():
            for member in group.members:
                member.process.thaw()

    async def _until(self, done: Any, otherwise: str) -> None:
        deadline_s = asyncio.get_running_loop().time() + DRAINED_S_MAX
        while not done():
            if asyncio.get_running_loop().time() > deadline_s:
                self.violations.append(otherwise)
                return
            await elapse(CHECK_S)

    def _all_jobs_have_ended(self) -> bool:
        return self._all_requests_are_consumed() and self._count("job-results") >= self._enqueued()

    def _count(self, topic: str) -> int:
        return sum(len(p.committed_entries()) for p in self.broker.topics[self.name(topic)].partitions)

    def _enqueued(self) -> int:
        entries = self.broker.topics[self.name("pool-inputs")].partitions[0].committed_entries()
        return sum(1 for entry in entries if b'"type":"settler.job.enqueued.v1"' in (entry.record.value or b""))

    def _all_requests_are_consumed(self) -> bool:
        return all(self._is_consumed("admission", topic) for topic in ("job-requests", "usage-events", "tenant-changes"))

    def _all_is_consumed(self) -> bool:
        settled = all(p.stable_end == p.end for topic in self.broker.topics.values() for p in topic.partitions)
        return settled and all(
            self._is_consumed(role, topic) for role in self.roles for topic in TOPOLOGY.fold(role).inputs
        )

    def _is_consumed(self, role: str, topic: str) -> bool:
        for number in range(TOPOLOGY.fold_partitions(role)):
            tp = TopicPartition(self.name(topic), number)
            position = max(self.broker.offsets.get((f"{DEPLOYMENT}.{role}", tp), 0), self.broker.partition(tp).start)
            if self.broker.partition(tp).has_records(position):
                return False
        return True


ROUTER = Router(TOPOLOGY)


def simulate(seed: int) -> World:
    """Run one seed in virtual time."""
    return run(World(seed).live())
