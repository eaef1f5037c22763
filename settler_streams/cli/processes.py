"""The processes of a deployment: ``settler worker``, ``executor``, ``courier``, ``gateway``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import structlog
import uvloop

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.telemetry import logs
from settler_streams.adapters.telemetry.metrics import serve_metrics
from settler_streams.cli.output import EXIT_CODES, flag
from settler_streams.courier.process import run as run_courier
from settler_streams.errors import InvalidRequestError, SettlerError
from settler_streams.executor.process import run as run_executor
from settler_streams.gateway.serve import serve
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from settler_streams.workers.folds import PROJECTIONS, ROLES, new_app
from settler_streams.workers.run import EXIT_ERROR, leave, run

log = structlog.get_logger(__name__)


@click.command()
@flag("--roles", env="SETTLER_ROLES", default="all", help=f"`all`, or some of {', '.join(ROLES)}; comma-separated.")
def worker(roles: str) -> None:
    """Run folds and projections until SIGTERM. Settings come from the environment.

    Exit codes: 0 after a signal, 1 after an error, 2 when another owner has taken over, 3 when stored state
    contradicts the log, 4 when nothing moved while work waited, 75 when a service did not answer at the start, 130
    after a second signal.
    """
    settings = _begin()
    sys.exit(uvloop.run(_work(settings, _chosen(roles))))


@click.command()
@flag("--name", env="SETTLER_EXECUTOR_NAME", default=None, help="Name in logs and events; else the host and the pid.")
@flag("--pool", env="SETTLER_POOL", type=int, default=0, help="Worker pool to serve.")
def executor(name: str | None, pool: int) -> None:
    """Run jobs until SIGTERM; running ones may finish first. Settings come from the environment."""
    settings = _begin()
    uvloop.run(run_executor(settings, name=name, pool=pool))


@click.command()
def courier() -> None:
    """Send webhooks until SIGTERM; requests under way may end. Settings come from the environment."""
    settings = _begin()
    uvloop.run(run_courier(settings))


@click.command()
def gateway() -> None:
    """Serve HTTP until SIGTERM. Settings come from the environment."""
    settings = Settings.from_environment()
    logs.configure(settings.log_level)
    uvloop.run(serve(settings))


def _begin() -> Settings:
    settings = Settings.from_environment()
    logs.configure(settings.log_level)
    port = serve_metrics(settings)
    log.info("metrics served", port=port)
    return settings


def _chosen(roles: str) -> list[str]:
    if roles == "all":
        return list(ROLES)
    chosen = [role.strip() for role in roles.split(",") if role.strip()]
    if unknown := sorted(set(chosen) - set(ROLES)):
        raise InvalidRequestError(f"no such roles: {', '.join(unknown)}; there are {', '.join(ROLES)}")
    if not chosen:
        raise InvalidRequestError(f"no role given; there are {', '.join(ROLES)}")
    return chosen


async def _work(settings: Settings, roles: Sequence[str]) -> int:
    topology = load_topology()
    pool = await TenantConnectionPool.open(settings) if set(roles) & set(PROJECTIONS) else None
    exit_code = EXIT_ERROR
    try:
        exit_code = await run([new_app(role, settings, topology, pool) for role in roles])
    except SettlerError as error:
        exit_code = EXIT_CODES[error.disposition]  # the command line's, if this process ends by itself
        raise
    finally:  # after a failed start, too, what has been started may refuse to end
        if pool is not None:
            await pool.close()
        leave(exit_code)
    return exit_code
