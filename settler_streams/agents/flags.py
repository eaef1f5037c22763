"""The flags agent: the only writer of flag changes and flag state.

Reads commands; writes each accepted change, kept for ever, and the compacted state that every process follows.
What is decided lies in :mod:`settler_streams.core.flag_commands`.
"""

from __future__ import annotations

from settler_streams.core.flag_commands import FlagCommands
from settler_streams.core.fold import State
from settler_streams.runtime.app import Batches
from settler_streams.topology import Topology

ROLE = "flags"
KINDS = FlagCommands.kinds


def new_logic(state: State, _partition: int, topology: Topology) -> FlagCommands:
    """One partition's flags; global ones go to all partitions."""
    return FlagCommands(state, topology.tenant_partitions)


async def flags(batches: Batches) -> None:
    """Accept whatever commands have arrived, one transaction per batch."""
    async for batch in batches:
        async with batch.step() as step:
            step.fold(batch.logic)
