"""`python -m tests.isolation`: many made statements, on a PostgreSQL of its own, as many at a time as there are cores.

Exit code 0 when A is told the same of all of them, 1 otherwise: then the statement is printed, shrunk, with what it was
answered and the command that repeats it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

import click

from tests.isolation.many_searches import searches
from tests.isolation.search import SEARCHED_MAX, Searched, shares
from tests.isolation.twins import make_twins
from tests.services.embedded import EmbeddedServices

PROGRESS_S = 30.0
"""Between two lines that say how far it is."""


@click.command()
@click.option("--statements", type=click.IntRange(1), default=SEARCHED_MAX, show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the first 10,000; the next 10,000 have the next."
)
@click.option("--processes", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
def main(statements: int, seed: int, processes: int) -> None:
    """Look for a statement that tells a tenant of the others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # PostgreSQL is stopped on the way
    with contextlib.closing(EmbeddedServices()) as services:
        services.postgres.start()
        processes = min(processes, len(shares(seed, statements)))
        databases = [asyncio.run(make_twins(services.settings)) for _ in range(processes)]
        with contextlib.closing(searches(databases, seed, statements)) as searched:
            sys.exit(_told(searched, statements))


def _told(searched: Iterable[Searched], statements: int) -> int:
    """Print how far it is and what is found; returns the exit code."""
    began_s = said_s = time.monotonic()
    asked = excused = 0
    for one in searched:
        if one.found is not None:
            click.echo(str(one))
            return 1
        asked += one.statements
        excused += one.excused
        now_s = time.monotonic()
        if now_s - said_s > PROGRESS_S or asked == statements:
            said_s = now_s
            click.echo(f"{now_s - began_s:5.0f} s  {asked:,} statements answered alike; the plan excused {excused:,}")
    return 0


if __name__ == "__main__":
    main()
