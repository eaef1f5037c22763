"""The table, the verdict and the outcome of the check, for a terminal or as plain lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from settler_streams.dev.demo.check import Verdict
from settler_streams.dev.demo.load import Tally
from settler_streams.dev.demo.noise import NoiseSeen


def progress_table(tallies: Sequence[Tally]) -> Table:
    """How far each tenant is."""
    table = Table(box=None)
    for column in ("tenant", "submitted", "admitted", "rejected", "finished", "open"):
        table.add_column(column, justify="left" if column == "tenant" else "right")
    for tally in tallies:
        rejected = sum(tally.rejected.values())
        counts = (tally.submitted, tally.admitted, rejected, tally.finished, tally.open)
        table.add_row(tally.load.name, *map(str, counts))
    return table


def final_table(tallies: Sequence[Tally]) -> Table:
    """What came of each tenant's jobs."""
    table = Table(title="What came of it")
    for column in ("tenant", "tier", "submitted", "admitted", "rejected by reason", "finished", "matches", "unmatched"):
        table.add_column(column, justify="left" if column in {"tenant", "tier", "rejected by reason"} else "right")
    table.add_column("p50 ms", justify="right")
    table.add_column("p99 ms", justify="right")
    for tally in tallies:
        table.add_row(
            tally.load.name,
            tally.load.tier,
            str(tally.submitted),
            str(tally.admitted),
            ", ".join(f"{reason} {count}" for reason, count in sorted(tally.rejected.items())) or "-",
            str(tally.finished),
            str(sum(result.matches for result in tally.results)),
            str(sum(result.unmatched for result in tally.results)),
            _milliseconds(tally.latencies_s, 50),
            _milliseconds(tally.latencies_s, 99),
        )
    return table


def say_noise(console: Console, verdicts: Sequence[NoiseSeen], names: dict[str, str]) -> None:
    """Who was found to be noisy, and by how much."""
    for verdict in verdicts:
        ratio = "-" if verdict.ratio_per_mille is None else f"{verdict.ratio_per_mille / 1000:.1f}"
        console.print(
            f"Noisy neighbour: {names[verdict.tenant]} on {verdict.resource}: {verdict.used} in a window, "
            f"the others {verdict.others_average} on average (ratio {ratio})"
        )


def say_check(console: Console, verdict: Verdict) -> None:
    """Whether the outcome holds."""
    console.print(
        f"Check: {verdict.requests} requests, {verdict.decisions} decisions; {verdict.admitted} admitted, "
        f"{verdict.results} results; {verdict.rows} rows in Postgres; {verdict.dead_letters} dead letter(s)"
    )
    for problem in verdict.problems:
        console.print(f"  does not hold: {problem}", style="bold red")
    if not verdict.problems:
        console.print("  every request has one decision, every admitted job one result", style="green")


def _milliseconds(latencies_s: Sequence[float], percentile: int) -> str:
    if not latencies_s:
        return "-"
    ordered = sorted(latencies_s)
    return f"{ordered[min(len(ordered) - 1, len(ordered) * percentile // 100)] * 1000:.0f}"
