"""Measure a reconciliation of generated sets: ``python -m settler_streams.reconciliation.measure``.

The sets are made by another process, so that the peak memory is that of the reconciliation alone. Seconds run from
the call with two paths to the result with its report; reading and parsing the files is part of them.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import click
import msgspec

from settler_streams.ids import TenantId
from settler_streams.reconciliation.generator import RULES, generate, score
from settler_streams.reconciliation.job import reconcile
from settler_streams.reconciliation.sources import FileSource, Format

_TENANT = TenantId("0197e000-0000-7000-8000-000000000001")


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one run shows."""

    rows: int
    seed: int
    format: Format
    seconds: float
    peak_rss_mib: float
    matches: int
    unmatched: int
    precision: float
    recall: float


def measure(rows: int, seed: int, file_format: Format) -> Measurement:
    """Generate in a child process, reconcile in this one."""
    with tempfile.TemporaryDirectory(prefix="settler-measure-") as folder:
        root = Path(folder)
        (root / _TENANT).mkdir()
        child = multiprocessing.get_context("spawn").Process(target=_generate, args=(root, rows, seed, file_format))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"generating the record sets failed with exit code {child.exitcode}")
        left, right = (FileSource(f"{side}.{file_format}", file_format) for side in ("left", "right"))
        started = time.perf_counter()
        result = reconcile(left, right, RULES, tenant=_TENANT, record_sets_dir=root)
        seconds = time.perf_counter() - started
        peak_rss_mib = _peak_rss_mib()
        truth = msgspec.json.decode((root / "truth.json").read_bytes(), type=list[tuple[str, tuple[str, ...]]])
    quality = score(result, truth)
    return Measurement(
        rows=rows,
        seed=seed,
        format=file_format,
        seconds=round(seconds, 3),
        peak_rss_mib=round(peak_rss_mib, 1),
        matches=result.matches.height,
        unmatched=result.unmatched.height,
        precision=round(quality.precision, 6),
        recall=round(quality.recall, 6),
    )


def _generate(root: Path, rows: int, seed: int, file_format: Format) -> None:
    sets = generate(seed, rows)
    sets.write(root / _TENANT, file_format)
    (root / "truth.json").write_bytes(msgspec.json.encode(sorted(sets.truth)))


def _peak_rss_mib() -> float:
    """The peak of this process: ``ru_maxrss`` is in KiB on Linux and in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@click.command()
@click.option("--rows", default=100_000, show_default=True, type=click.IntRange(1, 1_000_000), help="Rows per side.")
@click.option("--seed", default=7, show_default=True, help="Seed of the generator.")
@click.option(
    "--format", "file_format", default="csv", show_default=True, type=click.Choice(["csv", "jsonl", "parquet"])
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(rows: int, seed: int, file_format: Format, *, as_json: bool) -> None:
    """Reconcile generated record sets and print what it took."""
    measured = measure(rows, seed, file_format)
    if as_json:
        click.echo(msgspec.json.encode(measured).decode())
        return
    for name, value in msgspec.structs.asdict(measured).items():
        click.echo(f"{name:>14}  {value}")


if __name__ == "__main__":
    main()
