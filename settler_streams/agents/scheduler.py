"""The scheduler agent: fair turns between tenants, one pool per partition, and the only end a job has.

Reads its pool's log: arrivals, weights, cancellations, executors, reports, ticks; writes dispatches and results.
What is decided lies in :mod:`settler_streams.core.scheduler`.
"""

from __future__ import annotations

from settler_streams.core.fold import State
from settler_streams.core.scheduler import Scheduler
from settler_streams.runtime.app import Batches
from settler_streams.tiers import load_tiers
from settler_streams.topology import Topology

ROLE = "scheduler"
KINDS = Scheduler.kinds


def new_logic(state: State, partition: int, _topology: Topology) -> Scheduler:
    """One pool's decisions."""
    return Scheduler(state, partition, load_tiers().reserved_per_mille)


async def scheduler(batches: Batches) -> None:
    """Schedule after whatever has arrived, one transaction per batch."""
    async for batch in batches:
        async with batch.step() as step:
            step.fold(batch.logic)
