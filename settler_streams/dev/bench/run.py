"""The whole benchmark: interleaved rounds of the programs, then what is measured once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from settler_streams.dev.bench import latency, long_run, recorder, recovery, row_security, workload
from settler_streams.dev.bench.ground import SEED, TENANTS, Ground
from settler_streams.dev.bench.programs import Name, Program
from settler_streams.dev.bench.throughput import Measured, Work, measure

Part = Literal["rounds", "recovery", "recorder", "row-security", "latency", "long"]
PARTS: tuple[Part, ...] = ("rounds", "recovery", "recorder", "row-security", "latency")
"""What is measured unless something else is asked for."""
STOCK_REQUESTS_MAX = 16_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    requests: int = 240_000
    rounds: int = 2
    recovery_keys: int = 1_000_000
    recorded_jobs: int = 60_000
    row_security: row_security.Sizes = field(default_factory=row_security.Sizes)
    latency: latency.Sizes = field(default_factory=latency.Sizes)
    long_events: int = 1_000_000
    tenants: int = TENANTS

    @property
    def stock_requests(self) -> int:
        """The first part of the same requests: some seconds' worth at the stock program's speed."""
        return min(self.requests, STOCK_REQUESTS_MAX)


@dataclass
class Figures:
    """Everything that was measured; the lists have one entry per round, and what was not measured is ``None``."""

    stock: list[Measured] = field(default_factory=list)
    ceiling: list[Measured] = field(default_factory=list)
    pipeline: list[Measured] = field(default_factory=list)
    pipeline_two: list[Measured] = field(default_factory=list)
    recovery: recovery.Recovered | None = None
    recorder_rows_per_s: float | None = None
    row_security: row_security.Costs | None = None
    latency: latency.Latencies | None = None
    long: long_run.LongRun | None = None


async def run(ground: Ground, sizes: Sizes, parts: tuple[Part, ...] = PARTS) -> Figures:
    """Measure ``parts``, one after the other: nothing else of ours works meanwhile.

    Raises:
        StateError: what a program did is not what it was given.
        UnavailableError: something did not start or end in time.
    """
    figures = Figures()
    if "rounds" in parts:
        await _rounds(ground, sizes, figures)
    if "recovery" in parts:
        figures.recovery = found = await recovery.measure(ground, sizes.recovery_keys)
        ground.say(f"recovery: {found.keys_per_s:,.0f} keys/s, {found.cpu_s / found.keys * 1e6:.1f} us each")
    if "recorder" in parts:
        figures.recorder_rows_per_s = await recorder.measure(ground, sizes.recorded_jobs)
        ground.say(f"recorder: {figures.recorder_rows_per_s:,.0f} rows/s")
    if "row-security" in parts:
        figures.row_security = costs = await row_security.measure(ground.settings, sizes.row_security)
        gateway, recorded = costs.gateway.best.ratio_p95 - 1, costs.recorder.best.ratio_p95 - 1
        ground.say(
            f"row-level security at p95: the gateway's reads {gateway:+.1%}, the recorder's batches {recorded:+.1%}"
        )
    if "long" in parts:
        figures.long = await long_run.measure(ground, sizes.long_events)
    if "latency" in parts:  # last: the whole system stays up from here on
        figures.latency = await latency.measure(ground, sizes.latency)
    return figures


async def _rounds(ground: Ground, sizes: Sizes, figures: Figures) -> None:
    """Each program in turn, then all again: what disturbs one moment of the run disturbs all of them alike."""
    partitions = ground.topology.tenant_partitions
    tenants = workload.tenants(sizes.tenants, partitions, SEED)
    requests = list(workload.requests(tenants, sizes.requests, SEED))
    changes = list(workload.tenant_changes(tenants))
    work = Work(changes, requests)
    short = Work(changes, requests[: sizes.stock_requests])
    turns: tuple[tuple[list[Measured], Name, int, Work], ...] = (
        (figures.stock, "stock_faust", 1, short),
        (figures.ceiling, "ceiling", 1, work),
        (figures.pipeline, "pipeline", 1, work),
        (figures.pipeline_two, "pipeline", 2, work),
    )
    for number in range(sizes.rounds):
        for into, name, workers, given in turns:
            settings = ground.deployment(f"{name.replace('_', '-')}-{workers}-{number}")
            measured = await measure(ground, Program(name, settings, partitions, workers), given)
            ground.say(f"round {number + 1}: {measured.describe()}")
            into.append(measured)
