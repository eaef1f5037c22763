"""The whole benchmark: services of its own, interleaved rounds of the programs, then what is measured once."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from settler_streams.dev.bench import workload
from settler_streams.dev.bench.programs import Name, Program
from settler_streams.dev.bench.throughput import Measured, Work, measure
from settler_streams.dev.stack import EmbeddedStack
from settler_streams.dev.stack.stack import GIVEN_BY, PARTS
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

SEED = 20_260_101
TENANTS = 1_000
STOCK_REQUESTS_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The stock program gets the first part of the same requests: it is far slower."""

    requests: int = 240_000
    rounds: int = 3
    tenants: int = TENANTS

    @property
    def stock_requests(self) -> int:
        """Some seconds' worth at its speed."""
        return min(self.requests, STOCK_REQUESTS_MAX)


Say = Callable[[str], None]


@dataclass
class Figures:
    """Everything that was measured, by program; each list has one entry per round."""

    stock: list[Measured] = field(default_factory=list)
    ceiling: list[Measured] = field(default_factory=list)
    pipeline: list[Measured] = field(default_factory=list)
    pipeline_two: list[Measured] = field(default_factory=list)


class Bench:
    """One run on one stack."""

    def __init__(self, settings: Settings, broker_pid: int | None, folder: Path, sizes: Sizes, say: Say) -> None:
        self._settings = settings
        self._broker_pid = broker_pid
        self._folder = folder
        self._sizes = sizes
        self._say = say
        self._token = secrets.token_hex(3)

    async def compare(self) -> Figures:
        """The rounds: each program in turn, then all again. One that is disturbed disturbs one round of each."""
        sizes = self._sizes
        partitions = load_topology().tenant_partitions
        tenants = workload.tenants(sizes.tenants, partitions, SEED)
        requests = list(workload.requests(tenants, sizes.requests, SEED))
        changes = list(workload.tenant_changes(tenants))
        work = Work(changes, requests)
        short = Work(changes, requests[: sizes.stock_requests])
        figures = Figures()
        for number in range(sizes.rounds):
            turns: tuple[tuple[list[Measured], Name, int, Work], ...] = (
                (figures.stock, "stock_faust", 1, short),
                (figures.ceiling, "ceiling", 1, work),
                (figures.pipeline, "pipeline", 1, work),
                (figures.pipeline_two, "pipeline", 2, work),
            )
            for into, name, workers, given in turns:
                measured = await measure(self._program(name, workers, number, partitions), given, self._broker_pid)
                self._say(f"round {number + 1}: {_line(measured)}")
                into.append(measured)
        return figures

    def _program(self, name: Name, workers: int, number: int, partitions: int) -> Program:
        deployment = f"bench-{self._token}-{name.replace('_', '-')}-{workers}-{number}"
        settings = self._settings.model_copy(update={"deployment": deployment})
        return Program(name, settings, partitions, self._folder, workers)


async def run_bench(state_dir: Path, sizes: Sizes, say: Say) -> Figures:
    """Start services, measure, stop and delete them. The programs' logs stay only when something fails."""
    stack = own_stack(state_dir)
    folder = stack.state_dir.with_name(f"{stack.state_dir.name}-logs")
    folder.mkdir(parents=True)
    say("starting Kafka")
    try:
        settings = await asyncio.to_thread(stack.up, PARTS)
        figures = await Bench(settings, broker_pid(stack), folder, sizes, say).compare()
    except BaseException:
        say(f"the programs' logs: {folder}")
        raise
    else:
        shutil.rmtree(folder)
        return figures
    finally:
        await asyncio.to_thread(stack.destroy)


def own_stack(state_dir: Path) -> EmbeddedStack:
    """Services for this run alone: whatever the environment names stays untouched."""
    environ = {name: value for name, value in os.environ.items() if name not in GIVEN_BY.values()}
    return EmbeddedStack(state_dir / f"bench-{secrets.token_hex(4)}", environ=environ)


def broker_pid(stack: EmbeddedStack) -> int | None:
    """The process of the stack's broker."""
    return next((part.pid for part in stack.status() if part.name == "kafka"), None)


def _line(measured: Measured) -> str:
    answers = f", {measured.admitted} admitted" if measured.admitted else ""
    return (
        f"{measured.program} x{measured.workers}: {measured.events} in {measured.seconds:.2f} s, "
        f"{measured.eps:,.0f}/s{answers}, broker {measured.broker_share:.0%} of the processor time, "
        f"{measured.peak_rss_mib:.0f} MiB"
    )
