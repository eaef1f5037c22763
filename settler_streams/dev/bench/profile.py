"""Admission in one process without a broker: ``python -m settler_streams.dev.bench.profile``.

The real agent, step, session and logic run on real encoded records; only what goes to the broker ends in memory. So it
shows what a worker's own code costs, in microseconds per request and phase, and nothing of the network.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import pstats
import resource
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import uvloop
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.header_names import ForgivingRecords
from settler_streams.agents import admission
from settler_streams.core.admission import Admission
from settler_streams.dev.bench import workload
from settler_streams.dev.bench.admission_worker import new_logic
from settler_streams.dev.bench.ground import SEED, TENANTS
from settler_streams.dev.bench.phases import Phases, Place
from settler_streams.dev.bench.workload import Keyed
from settler_streams.runtime import outputs, step
from settler_streams.runtime.batch import Batch
from settler_streams.runtime.intake import Intake, Raw
from settler_streams.runtime.observation import Observation
from settler_streams.runtime.session import BATCH_BYTES, Session
from settler_streams.runtime.state import Overlay
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from settler_streams.workers.folds import FOLDS, fold_app
from settler_streams.workers.run import COLLECT_AFTER

PARTITION = 0
BEGAN_MS = 1_767_225_600_000
REQUESTS_PER_MS = 20
"""How fast the fold's clock goes: as if requests had come in at 20,000 a second in this partition."""


class Sink:
    """A producer whose broker takes everything at once. Batches are real, and are written out as they would be."""

    def __init__(self) -> None:
        self.batches = 0
        self.bytes = 0

    def create_batch(self) -> BatchBuilder:
        """As the producer's."""
        return BatchBuilder(BATCH_BYTES, 0, is_transactional=True)

    async def send_batch(self, batch: BatchBuilder, _topic: str, *, partition: int) -> asyncio.Future[None]:
        """Write the batch out, with its checksum, and forget it."""
        del partition
        self.written(batch)
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent

    def written(self, batch: BatchBuilder) -> None:
        """The batch as bytes."""
        self.batches += 1
        self.bytes += len(batch._build())  # noqa: SLF001 - what the sender calls

    async def begin_transaction(self) -> None:
        """Nothing to begin."""

    async def send_offsets_to_transaction(self, _offsets: Any, _group: str) -> None:
        """Nobody asks for them."""

    async def commit_transaction(self) -> None:
        """It is."""

    async def abort_transaction(self) -> None:
        """It was not."""


PLACES = [
    Place("fetch: parse record batches", PartitionRecords, "__next__"),
    Place("intake: route, checks", step.Step, "decode"),
    Place("decode", Intake, "event_of"),
    Place("decide", Admission, "decide"),
    Place("decide: settle", Admission, "settle"),
    Place("overlay: apply", Overlay, "apply"),
    Place("overlay: merge", Overlay, "merge"),
    Place("publish: route, headers", step.Step, "publish"),
    Place("publish: derived ids", step, "derived_id"),
    Place("metrics", Observation, "published"),
    Place("metrics", Observation, "committed"),
    Place("changelog: encode", step.Step, "_add_changelog"),
    Place("journal", step.Step, "_add_journal"),
    Place("produce: build batches", outputs.Lane, "add"),
    Place("produce: write out, checksum", Sink, "written"),
]


def encoded(records: Sequence[Keyed], now_ms: int) -> list[bytes]:
    """The records as the broker hands them out: record batches with its own timestamps."""
    builders: list[BatchBuilder] = []
    for number, record in enumerate(records):
        stamp = now_ms + number // REQUESTS_PER_MS
        if not builders or builders[-1].append(timestamp=stamp, key=record.key, value=record.value) is None:
            builders.append(BatchBuilder(BATCH_BYTES, 0, is_transactional=False))
            builders[-1].append(timestamp=stamp, key=record.key, value=record.value)
    return [bytes(builder._build()) for builder in builders]  # noqa: SLF001


class Fold:
    """One admission fold over memory, and the records that it has yet to read."""

    def __init__(self, tenants: int) -> None:
        topology = load_topology()
        made = workload.tenants(tenants, topology.tenant_partitions, SEED)
        self.tenants = [tenant for tenant in made if tenant.partition == PARTITION]
        settings = Settings()
        self.session: Session = fold_app(admission.ROLE, settings, topology).new_session(PARTITION)
        self.sink = Sink()
        self.session.producer = self.sink
        self.session.positions = dict.fromkeys(self.session.spec.inputs(PARTITION), 0)
        self.session.logic = self.session.spec.new_logic(self.session.state, PARTITION)

    def tp(self, name: str) -> TopicPartition:
        """One of its inputs."""
        return TopicPartition(self.session.spec.topic(name), PARTITION)

    def parsed(self, tp: TopicPartition, batches: Sequence[bytes]) -> list[Raw]:
        """What the consumer makes of record batches."""
        raws: list[Raw] = []
        for batch in batches:
            offset = self.session.positions[tp] + len(raws)
            placed = offset.to_bytes(8, "big") + batch[8:]  # a record batch begins with its first offset
            raws += PartitionRecords(tp, ForgivingRecords(placed), [], 0, None, None, True, READ_COMMITTED)
        return raws

    async def run(self, tp: TopicPartition, chunks: Sequence[Sequence[bytes]]) -> None:
        """Let the agent fold the chunks, a step for each."""

        async def batches() -> AsyncIterator[Batch]:
            for chunk in chunks:
                yield Batch(self.session, PARTITION, {tp: self.parsed(tp, chunk)})

        await FOLDS[admission.ROLE].agent(batches())


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor seconds of a run, and the part of them in which garbage was collected."""

    cpu_s: float
    gc_share: float


async def profile(events: int, per_step: int, tenants: int, profiler: cProfile.Profile | None) -> list[str]:
    """Fold ``events`` requests twice, plain and timed; returns the lines of the table.

    The total is the plain run's processor time, which other programs on the machine do not lengthen. The timed run
    says which part of it each phase has.
    """
    fold = Fold(tenants)
    changes = list(workload.tenant_changes(fold.tenants))
    await fold.run(fold.tp("tenant-changes"), [encoded(changes, BEGAN_MS)])
    requests = list(workload.requests(fold.tenants, 2 * events, SEED))
    plain, timed = (
        [encoded(half[at : at + per_step], BEGAN_MS + 1 + at // REQUESTS_PER_MS) for at in range(0, events, per_step)]
        for half in (requests[:events], requests[events:])
    )
    del requests
    gc.collect()
    spent = await _run(fold, plain, profiler)
    total_us = spent.cpu_s / events * 1e6
    phases = Phases(PLACES)
    with phases.timing():
        began_ns = time.perf_counter_ns()
        await fold.run(fold.tp("job-requests"), timed)
        timed_ns = time.perf_counter_ns() - began_ns
    return [
        f"{events} requests in steps of {per_step}, without a broker",
        f"{total_us:.2f} us each, {1e6 / total_us:,.0f} per second of processor time",
        f"the garbage collector has {spent.gc_share:.0%} of it",
        "",
        *_table(phases, timed_ns, total_us, events),
        "",
        f"{len(fold.session.state):,} keys of state",
        f"{fold.sink.bytes / (2 * events):,.0f} bytes written per request",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB of memory at the peak",
    ]


async def _run(fold: Fold, chunks: Sequence[Sequence[bytes]], profiler: cProfile.Profile | None) -> Spent:
    collector = Phases([])
    began_s, began_ns = time.process_time(), time.perf_counter_ns()
    if profiler is not None:
        profiler.enable()
    with collector.timing():
        await fold.run(fold.tp("job-requests"), chunks)
    if profiler is not None:
        profiler.disable()
    return Spent(time.process_time() - began_s, collector.gc_ns / (time.perf_counter_ns() - began_ns))


def _table(phases: Phases, timed_ns: int, total_us: float, events: int) -> list[str]:
    own = phases.corrected_ns()
    whole_ns = max(timed_ns - phases.timing_cost_ns(), sum(own.values()))
    own["everything else"] = whole_ns - sum(own.values())
    lines = [f"{'phase':<30}{'us/request':>12}{'share':>8}{'calls/request':>15}"]
    for phase, spent_ns in own.items():
        calls = phases.calls.get(phase, 0) / events
        lines.append(f"{phase:<30}{total_us * spent_ns / whole_ns:>12.2f}{spent_ns / whole_ns:>8.1%}{calls:>15.2f}")
    return lines + [f"no longer there, so not timed: {place}" for place in phases.gone]


def main() -> None:
    """Profile and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events", type=int, default=100_000)
    arguments.add_argument("--per-step", type=int, default=7_000, help="requests in one step; 4 MiB fetches hold 8,000")
    arguments.add_argument("--tenants", type=int, default=TENANTS, help="in all eight partitions")
    arguments.add_argument("--cprofile", type=int, default=0, metavar="ROWS", help="also print cProfile's top rows")
    arguments.add_argument("--sort", default="tottime", help="of cProfile's rows")
    given = arguments.parse_args()
    FOLDS[admission.ROLE] = replace(FOLDS[admission.ROLE], new_logic=new_logic)
    gc.set_threshold(*COLLECT_AFTER)  # as a worker does
    profiler = cProfile.Profile() if given.cprofile else None
    for line in uvloop.run(profile(given.events, given.per_step, given.tenants, profiler)):
        print(line)  # noqa: T201 - a program of its own
    if profiler is not None:
        pstats.Stats(profiler).sort_stats(given.sort).print_stats(given.cprofile)


if __name__ == "__main__":
    main()
