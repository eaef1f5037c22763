"""What befalls whole processes, groups and topics during a storm, beside the faults of single requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

from settler_streams.topology import Topology, full_name
from tests.simulation.broker import Broker
from tests.simulation.group import Group
from tests.simulation.member import Member
from tests.simulation.misfortunes import Faults
from tests.simulation.network import FROZEN_S_MAX
from tests.simulation.virtual_time import elapse

PAUSE_S_MAX = 4.0
REBALANCES = 3
"""In one flurry: most fall into the opening, the fetch or the step that follows the one before."""


@dataclass
class Storm:
    """Strikes now here, now there, for as long as the faults rage."""

    random: Random
    faults: Faults
    broker: Broker
    groups: dict[str, Group]
    topology: Topology
    deployment: str

    async def run(self) -> None:
        """Something happens every few seconds."""
        happenings = (self._restart, self._freeze, self._kill, self._flurry, self._compact, self._retain)
        while self.faults.raging:
            await elapse(self.random.random() * PAUSE_S_MAX)
            happening, role = self.random.choice(happenings), self.random.choice(list(self.groups))
            if (stopping := happening(role)) is not None:
                self.groups[role].see_to(stopping, stopping.stop())  # to its end, which may outlast the storm

    def _member(self, role: str) -> Member | None:
        members = [member for member in self.groups[role].members if not member.ended.is_set()]
        return self.random.choice(members) if members else None

    def _restart(self, role: str) -> Member | None:
        """SIGTERM, as a deployment sends it."""
        if (member := self._member(role)) is None or member.process.frozen:
            return None
        self.faults.count("worker restarted")
        return member

    def _freeze(self, role: str) -> None:
        if (member := self._member(role)) is not None:
            self.faults.count("worker frozen at any moment")
            member.process.freeze(self.random.uniform(1, FROZEN_S_MAX))

    def _kill(self, role: str) -> None:
        if (member := self._member(role)) is not None:
            self.faults.count("worker killed at any moment")
            member.process.crash()

    def _flurry(self, role: str) -> None:
        self.faults.count("rebalance in a flurry", REBALANCES)
        for _ in range(REBALANCES):
            asyncio.get_running_loop().call_later(self.random.random(), self.groups[role].rebalance)

    def _compact(self, role: str) -> None:
        """A tombstone stays while somebody loads: no load takes as long as Kafka keeps one."""
        self.faults.count("changelog compacted")
        changelog = full_name(self.deployment, self.topology.fold(role).changelog)
        for partition in self.broker.topics[changelog].partitions:
            loads = any(partition.tp.partition in member.opening_folds() for member in self.groups[role].members)
            partition.compact(tombstones_stay=loads)

    def _retain(self, role: str) -> None:
        """Retention takes from an input what all of its readers have consumed."""
        self.faults.count("inputs cut by retention")
        for topic in self.topology.fold(role).inputs:
            readers = [fold.role for fold in self.topology.folds if topic in fold.inputs and fold.role in self.groups]
            groups = [full_name(self.deployment, reader) for reader in readers]
            for partition in self.broker.topics[full_name(self.deployment, topic)].partitions:
                partition.delete_before(min(self.broker.offsets.get((group, partition.tp), 0) for group in groups))
