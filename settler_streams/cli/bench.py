"""The benchmark: ``settler bench``."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import cast

import click
import uvloop

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.dev.bench import report
from settler_streams.dev.bench.ground import prepared
from settler_streams.dev.bench.run import PARTS, Figures, Part, Sizes, run


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, writable=True), required=False)
@flag(
    "--part",
    "parts",
    env="SETTLER_BENCH_PARTS",
    multiple=True,
    type=click.Choice(PARTS),
    default=PARTS,
    help="What to measure; may be given several times.",
)
@flag("--rounds", env="SETTLER_BENCH_ROUNDS", type=click.IntRange(1, 100), default=2, help="Rounds of the programs.")
@flag(
    "--requests",
    env="SETTLER_BENCH_REQUESTS",
    type=click.IntRange(1_000, 2_000_000),
    default=Sizes().requests,
    help="Requests that each program gets in a round.",
)
@flag(
    "--events",
    env="SETTLER_BENCH_EVENTS",
    type=click.IntRange(10_000, 4_000_000_000),
    default=None,
    help="Measure this instead: the memory of a worker over as many requests.",
)
@flag(
    "--row-security-runs",
    env="SETTLER_BENCH_ROW_SECURITY_RUNS",
    type=click.IntRange(100, 1_000_000),
    default=Sizes().row_security.runs,
    help="Runs of each statement with and without row-level security.",
)
@state_dir_flag()
@json_flag()
def bench(
    path: Path | None,
    parts: tuple[str, ...],
    rounds: int,
    requests: int,
    events: int | None,
    row_security_runs: int,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Measure the data path, on services of its own that are deleted afterwards. PATH gets the JSON.

    Fails when the outputs of a program are not exactly one per request. Takes all cores, for some minutes.
    """
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it warns while it retries; topics have just been made
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, so the services are deleted
    sizes = Sizes(requests=requests, rounds=rounds, long_events=events or 0)
    sizes = replace(sizes, row_security=sizes.row_security._replace(runs=row_security_runs))
    chosen = cast("tuple[Part, ...]", ("long",) if events else parts)

    async def work() -> Figures:
        async with prepared(state_dir, lambda line: click.echo(line, err=True)) as ground:
            return await run(ground, sizes, chosen)

    found = report.document(uvloop.run(work()))
    if path is not None:
        path.write_text(report.as_text(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        print_table(("", "measured", ""), report.rows(found))
