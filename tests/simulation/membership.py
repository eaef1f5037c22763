"""The consumer that makes a worker a member of its group: it reads nothing, and asks whether it still counts there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from aiokafka.errors import KafkaError, RebalanceInProgressError
from aiokafka.structs import TopicPartition

from tests.simulation.clients import Consumer, SimulatedCluster

Answer = Callable[[], type[KafkaError] | None]


class Membership(Consumer):
    """As ``AIOKafkaConsumer`` that is subscribed. ``generation`` is the one that its assignment belongs to."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        super().__init__(cluster)
        self.generation = 0
        self._fetcher = object()
        self._coordinator = Coordinator(cluster)

    def join(self, heartbeat: Answer) -> None:
        """Enter a group, which answers heartbeats."""
        self._coordinator.ask = heartbeat

    def assigned(self, tps: Iterable[TopicPartition], generation: int) -> None:
        """The group has come to an agreement, of which this member has heard just now."""
        self.assign(tps)
        self.generation = generation
        self._coordinator.settled()

    def assignment(self) -> frozenset[TopicPartition]:
        """What this member believes to own."""
        return frozenset(self._assigned)


class Coordinator:
    """As aiokafka's: what a member knows of its group."""

    ask: Answer

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self.settled()

    def settled(self) -> None:
        """Nothing calls for a new generation."""
        self._rejoin_needed_fut: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def _do_heartbeat(self) -> bool:
        """Whether the group knows this member; it does while it forms anew, which the member then knows as well."""
        try:
            error = await self._cluster.request("heartbeat", self.ask)
        except KafkaError:
            return False
        if error is not None and not self._rejoin_needed_fut.done():
            self._rejoin_needed_fut.set_result(None)
        return error in (None, RebalanceInProgressError)
