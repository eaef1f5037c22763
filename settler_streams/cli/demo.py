"""The demo: ``settler demo``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import uvloop
from rich.console import Console

from settler_streams.cli.output import EXIT_DIFFERS, flag, state_dir_flag
from settler_streams.dev.demo.run import run_demo
from settler_streams.dev.system import LocalSystem
from settler_streams.errors import SettlerError

TABLE_WIDTH_MIN = 130
"""Columns that the final table needs; a narrower pipe would fold it."""


@click.command()
@flag("--keep/--no-keep", env="SETTLER_DEMO_KEEP", default=False, help="Leave the system running afterwards.")
@state_dir_flag()
def demo(keep: bool, state_dir: Path) -> None:
    """Start the local system, run the main job with five tenants, and check the outcome.

    Exit codes: 0 when the check holds, 3 when it does not.
    """
    console = Console()
    if console.width < TABLE_WIDTH_MIN and not console.is_terminal:
        console = Console(width=TABLE_WIDTH_MIN)
    started = time.monotonic()
    system = LocalSystem(state_dir)
    console.print("Starting Kafka, PostgreSQL, Valkey, a worker, an executor and the gateway ...")
    try:
        settings = system.up()
        console.print(f"Everything is up after {time.monotonic() - started:.1f} s; five tenants submit their jobs.")
        outcome = uvloop.run(run_demo(settings, console))
    except SettlerError:
        for process in system.status().processes:
            if process.state == "stopped":
                console.print(f"{process.name} has ended; its log: {process.log}", style="bold red")
        raise
    finally:
        if not keep:
            system.down()
    console.print(f"The demo took {time.monotonic() - started:.1f} s, {outcome.seconds:.1f} s of it for the jobs.")
    if keep:
        console.print("The system is still up: `settler status` shows where, `settler down` stops it.")
    sys.exit(EXIT_DIFFERS if outcome.problems else 0)
