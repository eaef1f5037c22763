"""The local system: ``settler up``, ``settler down``, ``settler status``."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from settler_streams.cli.output import EXIT_DIFFERS, flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.dev.system import PROCESSES_MAX, LocalSystem, SystemStatus

WATCH_INTERVAL_S = 1.0
_COUNT = click.IntRange(0, PROCESSES_MAX)


@click.command()
@flag("--executors", env="SETTLER_EXECUTORS", type=_COUNT, default=1, help="Executor processes.")
@flag("--workers", env="SETTLER_WORKERS", type=_COUNT, default=1, help="Worker processes, each with every role.")
@flag("--gateway/--no-gateway", env="SETTLER_GATEWAY", default=True, help="Whether to serve HTTP.")
@flag("--courier/--no-courier", env="SETTLER_COURIER", default=True, help="Whether to send webhooks.")
@flag("--detach", env="SETTLER_DETACH", is_flag=True, help="Return when everything is up; `settler down` stops it.")
@state_dir_flag()
@json_flag()
def up(
    executors: int, workers: int, gateway: bool, courier: bool, detach: bool, state_dir: Path, as_json: bool
) -> None:
    """Start everything on this machine: Kafka, PostgreSQL, Valkey, and our own processes.

    Stays until Ctrl-C, then stops it all. What runs already is reused. A process that ends is started again.
    """
    system = LocalSystem(state_dir)
    stop = _stop_on_signals()
    try:
        system.up(executors, workers, gateway=gateway, courier=courier)
        _print(system.status(), as_json=as_json)
        if detach:
            return
        click.echo("up; Ctrl-C stops everything", err=True)
        if not (executors or workers or gateway or courier):
            stop.wait()
        elif _taken_down_by_another(system, stop):
            return  # who may be deleting what there is of it
    except BaseException:
        system.down()
        raise
    system.down()


@click.command()
@flag("--delete", env="SETTLER_DOWN_DELETE", is_flag=True, help="Delete the data as well; record sets stay.")
@state_dir_flag()
@json_flag()
def down(delete: bool, state_dir: Path, as_json: bool) -> None:
    """Stop everything that `settler up` has started, leftovers of a crash included. Data stays without --delete."""
    system = LocalSystem(state_dir)
    system.down()
    if delete:
        system.delete()
    if as_json:
        _print(system.status(), as_json=True)


@click.command()
@state_dir_flag()
@json_flag()
def status(state_dir: Path, as_json: bool) -> None:
    """Show the local system's processes and addresses (the URLs hold passwords). Exit code 3: not everything is up."""
    found = LocalSystem(state_dir).status()
    _print(found, as_json=as_json)
    sys.exit(0 if found.running else EXIT_DIFFERS)


def _stop_on_signals() -> threading.Event:
    """The first signal asks for an orderly end, also during the start; a second one interrupts whatever is going on."""
    stop = threading.Event()

    def on_signal(signum: int, _frame: object) -> None:
        if stop.is_set():
            signal.signal(signum, signal.SIG_DFL)
            raise KeyboardInterrupt
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)
    return stop


def _taken_down_by_another(system: LocalSystem, stop: threading.Event) -> bool:
    """Watch over the processes until ``stop``, or until somebody else stops the system."""
    while not stop.wait(WATCH_INTERVAL_S):
        if system.taken_down:
            click.echo("stopped by another `settler down`", err=True)
            return True
        for name in system.restart_ended():
            click.echo(f"{name} ended and was started again; see {system.state_dir / 'processes' / name}.log", err=True)
    return False


def _print(found: SystemStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(_document(found))
        return
    addresses = [(part.name, part.state, part.pid, part.address) for part in found.services]
    processes = [(one.name, one.state, one.pid, one.log) for one in found.processes]
    print_table(("", "state", "pid", "address or log"), [*addresses, *processes])
    urls = [(name, value) for name, value in _document(found).items() if isinstance(value, str)]
    click.echo()
    print_table(("", ""), urls)


def _document(found: SystemStatus) -> dict[str, Any]:
    settings = found.settings
    gateway_url = f"http://{settings.gateway_host}:{settings.gateway_port}"
    metrics = {one.name: one.metrics_url for one in found.processes}
    return {
        "running": found.running,
        "kafka": settings.kafka_bootstrap_servers,
        "postgres_owner_url": settings.postgres_url(owner=True),
        "postgres_app_url": settings.postgres_url(),
        "redis_url": settings.redis_url(),
        "gateway_url": gateway_url,
        "metrics_url": f"{gateway_url}/metrics" if "gateway" in metrics else next(iter(metrics.values()), ""),
        "metrics_urls": metrics,
        "services": {part.name: {"state": part.state, "pid": part.pid} for part in found.services},
        "processes": {one.name: {"state": one.state, "pid": one.pid, "log": str(one.log)} for one in found.processes},
    }
