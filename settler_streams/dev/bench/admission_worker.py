"""Program (c): a worker process with the admission role, as `settler worker --roles admission` runs it.

One number differs: how many jobs may be open at once. The benchmark has no executors that would end them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import uvloop

from settler_streams.adapters.telemetry import logs
from settler_streams.agents import admission
from settler_streams.core.admission import Admission, AdmissionPolicy
from settler_streams.core.fold import State
from settler_streams.settings import Settings
from settler_streams.tiers import load_tiers
from settler_streams.topology import Topology, load_topology
from settler_streams.workers.folds import FOLDS, fold_app
from settler_streams.workers.run import leave, run

OPEN_JOBS_MAX = 2**31
"""More than any run has requests."""


def new_logic(state: State, _partition: int, topology: Topology) -> Admission:
    """Admission with room for every job of the run."""
    return Admission(state, AdmissionPolicy(load_tiers(), OPEN_JOBS_MAX, topology.worker_pools))


async def _work(settings: Settings) -> int:
    exit_code = await run([fold_app(admission.ROLE, settings, load_topology())])
    leave(exit_code)
    return exit_code


def main() -> None:
    """Run until SIGTERM. Settings come from the environment."""
    settings = Settings.from_environment()
    logs.configure(settings.log_level)
    FOLDS[admission.ROLE] = replace(FOLDS[admission.ROLE], new_logic=new_logic)
    sys.exit(uvloop.run(_work(settings)))


if __name__ == "__main__":
    main()
