"""The benchmark: ``settler bench``."""

from __future__ import annotations

import logging
from pathlib import Path

import click
import uvloop

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.dev.bench import report
from settler_streams.dev.bench.run import Sizes, run_bench


@click.command()
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False, writable=True), required=False)
@flag("--rounds", env="SETTLER_BENCH_ROUNDS", type=click.IntRange(1, 100), default=3, help="How often each is run.")
@flag(
    "--requests",
    env="SETTLER_BENCH_REQUESTS",
    type=click.IntRange(1_000, 5_000_000),
    default=240_000,
    help="Requests per run.",
)
@state_dir_flag()
@json_flag()
def bench(path: Path | None, rounds: int, requests: int, state_dir: Path, as_json: bool) -> None:
    """Measure the data path, on services of its own that are deleted afterwards. PATH gets the JSON.

    Fails when a program's outputs are not exactly one per request.
    """
    logging.getLogger("aiokafka").setLevel(logging.ERROR)  # it reports what it retries; topics have just been made
    sizes = Sizes(requests=requests, rounds=rounds)
    figures = uvloop.run(run_bench(state_dir, sizes, lambda line: click.echo(line, err=True)))
    found = report.document(figures)
    if path is not None:
        path.write_text(report.as_text(found), encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        print_table(("", "measured", "rounds"), report.rows(found))
