"""One seed from beginning to end: a storm of work and faults, then calm until everything has drained.

What has happened is judged afterwards, by :mod:`tests.simulation.judge`, from the log alone; what the workers
themselves report as impossible is collected in ``violations``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from random import Random
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.errors import FencedError, UnavailableError
from settler_streams.events import ClockTick, JobsEnqueued, decode, encode, envelope
from settler_streams.ids import PLATFORM
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import FoldSpec
from settler_streams.topology import Topology, load_topology
from settler_streams.workers.folds import FOLDS
from tests.simulation.broker import Broker
from tests.simulation.group import Group
from tests.simulation.member import Member, member_of
from tests.simulation.misfortunes import Faults
from tests.simulation.network import Network, Process
from tests.simulation.simulated_executors import Executor
from tests.simulation.storm import Storm
from tests.simulation.virtual_time import elapse, run
from tests.simulation.workload import MESSAGE_BYTES_MAX, PARTITIONS, STORM_S, Author

DEPLOYMENT = "sim"
DRAINED_S_MAX = 150.0
"""Leases of ten seconds, five attempts, and whatever still hangs when the storm ends: ample."""
TICK_S = 5.0
"""Slower than the real ticker, to spend the time on other records; leases and windows are far longer."""
CHECK_S = 1.0
BROKER_BYTES_MAX = 2**20
"""The broker weighs batches: those of a step are up to half of this."""

QUIET_S = 90.0
"""By then every worker that hung has ended and has been replaced."""
GONE_S = 8.0
"""Between a topic's end and its new beginning: every fold asks for records meanwhile."""
RECREATED_S = 30.0
"""Time enough for every worker to end and begin again several times."""

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
    states: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """What the sessions hold at the end, by role and partition."""

    def __post_init__(self) -> None:
        self.random = Random(f"{self.seed}/world")  # noqa: S311 - repeatable on purpose
        self.faults = Faults(Random(f"{self.seed}/faults"))  # noqa: S311
        self.network = Network(Random(f"{self.seed}/network"), self.faults)  # noqa: S311
        self.broker = Broker(marker_delay_s=lambda: self.network.random.random() * 0.05)
        self.roles = ["admission", "scheduler"]
        if self.seed % 5 == 0:
            self.roles.append("flags")
        if self.seed % 10 == 1:
            self.roles += ["noisy-neighbour", "noisy-detector"]
        self.groups: dict[str, Group] = {}
        self.executors: list[Executor] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._router = Router(TOPOLOGY)
        self._processes: list[Process] = []
        self._ticks = 0

    def name(self, topic: str) -> str:
        """A topic's full name."""
        return f"{DEPLOYMENT}.{topic}"

    async def live(self) -> World:
        """Run the seed."""
        self.create_topics()
        for role in self.roles:
            self._found(role)
        for number in range(2):
            executor = Executor(f"executor-{number}", DEPLOYMENT, self.broker, self.random, self.faults)
            self.executors.append(executor)
            self._spawn(executor.run())
        self._spawn(self._tick())
        self._spawn(self._produce())
        self._spawn(Storm(self.random, self.faults, self.broker, self.groups, TOPOLOGY, DEPLOYMENT).run())
        await elapse(STORM_S)
        self._calm()
        await self._until(self._all_jobs_have_ended, "jobs never end")
        for task in self._tasks:
            task.cancel()
        for executor in self.executors:
            executor.stop()
        await self._until(self._all_is_consumed, "inputs are never consumed")
        await self._rest()
        self.crashes = [error for group in self.groups.values() for error in group.failures]
        self.violations += [f"a worker ended with {e!r}" for e in self.crashes if not isinstance(e, EXPECTED)]
        self.virtual_s = asyncio.get_running_loop().time()
        return self

    def create_topics(self) -> None:
        """Every topic, empty."""
        for declared in TOPOLOGY.declared(DEPLOYMENT):
            self.broker.create_topic(declared.topic, declared.partitions, BROKER_BYTES_MAX)

    async def recreate(self, topic: str, role: str) -> list[str]:
        """Delete an input, make it again, fill it, and wait; what the workers of ``role`` have ended with since.

        It waits for the last rebalance first: a session that reads nothing while the topic is gone cannot notice.
        """
        await elapse(QUIET_S)
        name, group = self.name(topic), self.groups[role]
        before = len(group.failures)
        former = self.broker.topics.pop(name)
        await elapse(GONE_S)
        self.broker.create_topic(name, len(former.partitions), former.message_bytes_max)
        for partition in former.partitions:
            for entry in (*partition.history, *partition.history):
                if entry.record is not None:
                    self.broker.append(name, partition.tp.partition, entry.record.key, entry.record.value)
        await elapse(RECREATED_S)
        return [str(error) for error in group.failures[before:]]

    def end(self) -> None:
        """Nobody does anything any more."""
        for process in self._processes:
            process.crash()

    def written_by(self, role: str, *, except_in: str) -> int:
        """How many records a role has committed to other topics than one."""
        own = f"{DEPLOYMENT}.{role}-"
        return sum(
            entry.transaction is not None and entry.transaction.transactional_id.startswith(own)
            for name, topic in self.broker.topics.items()
            for partition in topic.partitions
            for entry in partition.committed_entries()
            if name != self.name(except_in)
        )

    def _found(self, role: str) -> None:
        """A role's group, and its first workers."""
        declared = TOPOLOGY.fold(role)
        inputs = tuple(self.name(topic) for topic in declared.inputs)
        partitions = TOPOLOGY.fold_partitions(role)
        group = Group(inputs, partitions, partial(self.new_worker, role), self.random, self.faults)
        self.groups[role] = group
        for _ in range(2 if role in ("admission", "scheduler") else 1):
            group.join()
        asyncio.get_running_loop().create_task(group.run()).add_done_callback(self._group_ended)

    def _group_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.violations.append(f"a rebalance failed: {task.exception()!r}")

    def new_worker(self, role: str) -> Member:
        """A worker process, which belongs to no group yet."""
        process = Process(f"{role}-{len(self._processes) + 1}")
        self._processes.append(process)
        fold = FOLDS[role]
        spec = FoldSpec(
            declared=TOPOLOGY.fold(role),
            topology=TOPOLOGY,
            cluster=None,  # type: ignore[arg-type]
            deployment=DEPLOYMENT,
            kinds=fold.kinds,
            new_logic=lambda state, partition: fold.new_logic(state, partition, TOPOLOGY),
            router=self._router,
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

    async def _rest(self) -> None:
        """Every fold is open in one worker, and waits for nothing; what it holds is noted in ``states``."""
        deadline_s = asyncio.get_running_loop().time() + DRAINED_S_MAX
        while not (await self._nothing_waits() and self._note_states()):
            if asyncio.get_running_loop().time() > deadline_s:
                self.violations.append("folds never come to rest")
                return
            await elapse(CHECK_S)

    async def _nothing_waits(self) -> bool:
        """Whether the workers say so, of whom the watchdog would ask the same."""
        try:
            standings = [await member.standings() for group in self.groups.values() for member in list(group.members)]
        except (KafkaError, UnavailableError):  # it ends while it is asked; its successor is asked next time
            return False
        return not any(standing.waits for standing in chain.from_iterable(s.values() for s in standings))

    def _note_states(self) -> bool:
        """Look at one moment: False if something has come up since, or a commit has not reached its session yet."""
        self.states = {}
        members = [(role, member) for role in self.roles for member in self.groups[role].members]
        for role, member in members:
            for number, state in member.open_states().items():
                self.states[role, number] = dict(state.committed)
        folds = [(role, number) for role in self.roles for number in range(TOPOLOGY.fold_partitions(role))]
        opened = sorted((role, number) for role, member in members for number in member.open_folds())
        return (
            opened == sorted(folds)
            and self._all_is_consumed()
            and not any(member.ended.is_set() or member.lags(self.broker) for _, member in members)
        )

    def _all_jobs_have_ended(self) -> bool:
        return (
            self._is_settled() and self._all_requests_are_consumed() and self._count("job-results") >= self._enqueued()
        )

    def _is_settled(self) -> bool:
        """Whether no transaction is open or has markers still to be written."""
        return all(p.stable_end == p.end for topic in self.broker.topics.values() for p in topic.partitions)

    def _count(self, topic: str) -> int:
        return sum(len(p.committed_entries()) for p in self.broker.topics[self.name(topic)].partitions)

    def _enqueued(self) -> int:
        entries = self.broker.topics[self.name("pool-inputs")].partitions[0].committed_entries()
        values = [entry.record.value or b"" for entry in entries]
        found = [decode(value).data for value in values if b'"type":"settler.pool.jobs-enqueued.v1"' in value]
        return sum(len(body.jobs) for body in found if isinstance(body, JobsEnqueued))

    def _all_requests_are_consumed(self) -> bool:
        return all(
            self._is_consumed("admission", topic) for topic in ("job-requests", "usage-events", "tenant-changes")
        )

    def _all_is_consumed(self) -> bool:
        return self._is_settled() and all(
            self._is_consumed(role, topic) for role in self.roles for topic in TOPOLOGY.fold(role).inputs
        )

    def _is_consumed(self, role: str, topic: str) -> bool:
        for number in range(TOPOLOGY.fold_partitions(role)):
            tp = TopicPartition(self.name(topic), number)
            position = max(self.broker.offsets.get((f"{DEPLOYMENT}.{role}", tp), 0), self.broker.partition(tp).start)
            if self.broker.partition(tp).has_records(position):
                return False
        return True


def simulate(seed: int) -> World:
    """Run one seed in virtual time."""

    async def lived() -> World:
        world = await World(seed).live()
        world.end()
        return world

    return run(lived())
