"""The admission agent: every job request gets exactly one decision.

Reads requests, usage, tenants, flags and results; writes decisions, and the places of admitted jobs in their pool.
What is decided lies in :mod:`settler_streams.core.admission`.
"""

from __future__ import annotations

from settler_streams.core.admission import Admission, AdmissionPolicy
from settler_streams.core.fold import State
from settler_streams.runtime.app import Batches
from settler_streams.tiers import load_tiers
from settler_streams.topology import Topology

ROLE = "admission"
KINDS = Admission.kinds


def new_logic(state: State, _partition: int, topology: Topology) -> Admission:
    """One partition's decisions. A pool's queue bound is shared out evenly among the partitions that feed it."""
    tiers = load_tiers()
    open_jobs_max = max(1, tiers.pool_queue_max // topology.tenant_partitions)
    return Admission(state, AdmissionPolicy(tiers, open_jobs_max, topology.worker_pools))


async def admission(batches: Batches) -> None:
    """Decide on whatever has arrived, one transaction per batch."""
    async for batch in batches:
        async with batch.step() as step:
            step.fold(batch.logic)
