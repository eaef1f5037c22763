"""One program, one load: start it, give it everything at once, see when the last output was appended, and check.

The rate is the number of requests by the time from the load's release to the last output's LogAppendTime. The
program's own claims count for nothing: its end is its committed position, its work is what the log holds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from settler_streams.dev.bench import log
from settler_streams.dev.bench.ground import READY_S_MAX, Ground, check_alive, running, wait_for_line
from settler_streams.dev.bench.memory import Footprint
from settler_streams.dev.bench.processors import ProcessorTime
from settler_streams.dev.bench.programs import Program
from settler_streams.dev.bench.workload import Keyed
from settler_streams.dev.stack import ChildProcess
from settler_streams.errors import StateError

RUN_DEADLINE_S = 300.0
"""Longest run of one program: ten times what the slowest needs on the machine it was sized for."""
CHANGELOGS = {"cleanup_policy": "compact"}


@dataclass(frozen=True, slots=True)
class Work:
    """What a program gets: the same for every one of a round."""

    tenant_changes: Sequence[Keyed]
    requests: Sequence[Keyed]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run. Processor times are those of the measured seconds, per process kind."""

    program: str
    workers: int
    events: int
    seconds: float
    admitted: int
    refused: dict[str, int]
    broker_cpu_s: float
    workers_cpu_s: float
    workers_waited_s: float
    """How long threads of the workers were ready to run while the processors were busy with others."""
    peak_rss_mib: float

    @property
    def eps(self) -> float:
        """Events per second."""
        return self.events / self.seconds

    @property
    def broker_share(self) -> float:
        """The broker's part of all the processor time that the broker and the workers took."""
        return self.broker_cpu_s / max(self.broker_cpu_s + self.workers_cpu_s, 1e-9)

    def describe(self) -> str:
        """One line for people."""
        answers = f", {self.admitted:,} admitted" if self.admitted else ""
        return (
            f"{self.program} x{self.workers}: {self.events:,} in {self.seconds:.2f} s, {self.eps:,.0f}/s{answers}; "
            f"broker {self.broker_share:.0%} of the processor time; "
            f"workers {self.workers_cpu_s / self.events * 1e6:.1f} us each, waited {self.workers_waited_s:.1f} s, "
            f"{self.peak_rss_mib:.0f} MiB"
        )


async def measure(ground: Ground, program: Program, work: Work) -> Measured:
    """Run ``program`` on ``work`` and check what it did; its topics are deleted afterwards.

    Raises:
        StateError: outputs are missing, doubled, or belong to no request.
        UnavailableError: it did not start or end in time.
    """
    cluster, deployment = program.cluster, program.settings.deployment
    processes = program.processes(ground)
    late = program.name == "stock_faust"  # reads uncommitted records, so it gets them when it is ready
    await _create_topics(program)
    try:
        async with log.Load(cluster, f"{deployment}.load") as load, running(processes):
            if not late:
                await load.append(program.input_topic, work.requests)
            await _wait_ready(program, processes, work)
            footprints = [Footprint(process) for process in processes]
            pids = [process.ref.pid for process in processes if process.ref is not None]
            broker, workers = ProcessorTime([ground.broker_pid]), ProcessorTime(pids)
            began_ms = time.time() * 1000
            if late:
                await load.append(program.input_topic, work.requests)
            await load.commit()
            await _wait_done(program, processes, work, footprints)
            broker_spent, workers_spent = broker.since(), workers.since()
        last_ms, answers = await check_outputs(program, work)
    finally:
        await log.delete_topics(cluster, f"{deployment}.")
    return Measured(
        program.name,
        program.workers,
        len(work.requests),
        (last_ms - began_ms) / 1000,
        answers.pop("admitted", 0),
        dict(answers),
        broker_spent.used_s,
        workers_spent.used_s,
        workers_spent.waited_s,
        max(footprint.peak_mib for footprint in footprints),
    )


async def _create_topics(program: Program) -> None:
    cluster, deployment = program.cluster, program.settings.deployment
    if program.name == "pipeline":
        await log.create_declared(program.settings)
        return
    for name in ("requests", "outputs"):
        await log.create_topic(cluster, f"{deployment}.{name}", program.partitions)
    if program.name == "ceiling":
        await log.create_topic(cluster, f"{deployment}.changelog", program.partitions, **CHANGELOGS)


async def _wait_ready(program: Program, processes: Sequence[ChildProcess], work: Work) -> None:
    if program.name != "pipeline":
        await asyncio.gather(*(wait_for_line(process, "bench ready") for process in processes))
        return
    share = program.partitions // len(processes)
    await asyncio.to_thread(_wait_shared_out, processes, share)
    cluster, topic = program.cluster, f"{program.settings.deployment}.tenant-changes"
    async with log.Load(cluster, f"{program.settings.deployment}.tenants") as load:
        await load.append(topic, work.tenant_changes)
        await load.commit()
    ends = log.ends_of(topic, work.tenant_changes)
    await log.wait_committed(cluster, program.group, ends, READY_S_MAX, lambda: check_alive(processes))


def _wait_shared_out(processes: Sequence[ChildProcess], share: int) -> None:
    """Until each process has its share of the folds: a rebalance during the measurement would be measured."""

    def shared_out() -> bool:
        for process in processes:
            check_alive([process])
            assigned = [line for line in process.log.read_text().splitlines() if '"folds assigned"' in line]
            if not assigned or len(json.loads(assigned[-1])["folds"]) != share:
                return False
        return True

    processes[0].wait_until(shared_out, deadline_s=READY_S_MAX)


async def _wait_done(
    program: Program, processes: Sequence[ChildProcess], work: Work, footprints: Sequence[Footprint]
) -> None:
    cluster = program.cluster

    def alive() -> None:
        check_alive(processes)
        for footprint in footprints:
            footprint.sample()

    if program.name == "stock_faust":  # commits its positions every few seconds only
        await log.wait_appended(cluster, program.output_topic, len(work.requests), RUN_DEADLINE_S, alive)
    else:
        ends = log.ends_of(program.input_topic, work.requests)
        await log.wait_committed(cluster, program.group, ends, RUN_DEADLINE_S, alive)


class _Decided(msgspec.Struct):
    job_id: str
    admitted: bool
    reason: str = ""


class _Decision(msgspec.Struct):
    data: _Decided


class _Counted(msgspec.Struct):
    id: str
    tenant: str
    count: int


class _Request(msgspec.Struct):
    id: str


async def check_outputs(program: Program, work: Work) -> tuple[int, Counter[str]]:
    """Read the outputs back: exactly one for every request, by its id.

    Returns:
        the LogAppendTime of the last one, and how often each answer was given (``admitted``, or why not).

    Raises:
        StateError: an output is missing, doubled, or belongs to no request.
    """
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Decision if program.name == "pipeline" else _Counted)
    ids: list[str] = []
    answers: Counter[str] = Counter()
    last_ms = 0
    async for chunk in log.read_all(program.cluster, program.output_topic):
        last_ms = max(last_ms, *(record.timestamp for record in chunk))
        for record in chunk:
            output = decoder.decode(record.value)
            if program.name == "pipeline":
                ids.append(output.data.job_id)
                answers["admitted" if output.data.admitted else output.data.reason] += 1
            else:
                ids.append(output.id)
    compare(program.name, ids, work.requests)
    return last_ms, answers


def compare(program: str, ids: Sequence[str], requests: Sequence[Keyed]) -> None:
    """Hold the outputs' ids against the requests'.

    Raises:
        StateError: they differ; says how many are missing, doubled or unknown.
    """
    request_decoder = msgspec.json.Decoder(_Request)
    wanted = {request_decoder.decode(request.value).id for request in requests}
    distinct = set(ids)
    missing, doubled, unknown = len(wanted - distinct), len(ids) - len(distinct), len(distinct - wanted)
    if missing or doubled or unknown:
        raise StateError(
            f"{program}: {len(requests)} requests have {len(ids)} outputs: "
            f"{missing} missing, {doubled} doubled, {unknown} unknown"
        )
