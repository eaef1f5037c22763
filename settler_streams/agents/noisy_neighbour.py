"""The noisy-neighbour agents: per-partition sums, and the one detector that judges all tenants together.

Read decisions, results, usage and ticks; write partial sums, and the signals that a tenant is noisy or quiet again.
What is decided lies in :mod:`settler_streams.core.noise`.
"""

from __future__ import annotations

from settler_streams.core.fold import State
from settler_streams.core.noise import NoisyDetector, NoisyNeighbour
from settler_streams.runtime.app import Batches
from settler_streams.topology import Topology

ROLE = "noisy-neighbour"
KINDS = NoisyNeighbour.kinds
DETECTOR_ROLE = "noisy-detector"
DETECTOR_KINDS = NoisyDetector.kinds


def new_logic(state: State, partition: int, _topology: Topology) -> NoisyNeighbour:
    """One partition's sums."""
    return NoisyNeighbour(state, partition)


def new_detector(state: State, _partition: int, topology: Topology) -> NoisyDetector:
    """The detector: there is one, and it waits for every partition's sums."""
    return NoisyDetector(state, topology.fold_partitions(ROLE))


async def noisy_neighbour(batches: Batches) -> None:
    """Sum up, or judge, whatever has arrived, one transaction per batch."""
    async for batch in batches:
        async with batch.step() as step:
            step.fold(batch.logic)
