"""A long run: a worker decides on millions of requests, whose jobs end as they would, and its memory is sampled.

Here the bound on open jobs is the real one. Whoever runs the benchmark stands in for the scheduler: it reads each
decision, and ends an admitted job at once. Requests are kept coming, so that the worker is never idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.agents import admission
from settler_streams.dev.bench import log, workload
from settler_streams.dev.bench.ground import READY_S_MAX, SEED, TENANTS, Ground, check_alive, running
from settler_streams.dev.bench.memory import Footprint
from settler_streams.dev.bench.workload import BEGINNING, SOURCE, BenchTenant, Keyed
from settler_streams.errors import StateError, UnavailableError
from settler_streams.events import JobFinished, JobStatus, encode, envelope
from settler_streams.ids import PLATFORM
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology

WINDOW = 40_000
"""Requests that wait for their decision at most: full batches for all folds, and far below the bound of open jobs."""
CHUNK = 10_000
STALL_S_MAX = 60.0
"""Without any decision for so long, something is broken; the slowest batch takes a second."""
SAMPLE_INTERVAL_S = 1.0
SAY_EVERY = 20
_ID = b'"id":"'
TEMPLATES = 20_000
"""Different requests; beyond that only their ids are new."""
SEGMENT_BYTES = 64 * 2**20
RETENTION_BYTES = 4 * SEGMENT_BYTES
"""The log of ten million requests would fill the disk; what is further back than this has long been read."""


class _Decided(msgspec.Struct):
    job_id: str
    admitted: bool


class _Decision(msgspec.Struct):
    tenantid: str
    data: _Decided


@dataclass
class LongRun:
    """What was seen: decisions, and the worker's memory as (decisions so far, MiB)."""

    events: int = 0
    admitted: int = 0
    seconds: float = 0.0
    peak_rss_mib: float = 0.0
    samples: list[tuple[int, float]] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """The greatest memory of the last quarter by the greatest of the second quarter; 1.0 is flat."""
        quarter = max(1, len(self.samples) // 4)
        second = max(mib for _, mib in self.samples[quarter : 2 * quarter] or self.samples[:1])
        return max(mib for _, mib in self.samples[-quarter:]) / second


async def measure(ground: Ground, events: int) -> LongRun:
    """Send ``events`` requests, and see every one decided.

    Raises:
        StateError: there were more decisions than requests.
        UnavailableError: no decision came for a minute.
    """
    settings = ground.deployment("long")
    cluster = Cluster.of(settings)
    await _create_topics(settings)
    process = ground.process(settings, "worker", "settler_streams.cli.main", "worker", "--roles", admission.ROLE)
    tenants = workload.tenants(TENANTS, ground.topology.tenant_partitions, SEED)
    try:
        async with log.Load(cluster, f"{settings.deployment}.load") as load, running([process]):
            topic, changes = full_name(settings.deployment, "tenant-changes"), list(workload.tenant_changes(tenants))
            await load.append(topic, changes)
            await load.commit()
            ends = log.ends_of(topic, changes)
            group = f"{settings.deployment}.{admission.ROLE}"
            await log.wait_committed(cluster, group, ends, READY_S_MAX, lambda: check_alive([process]))
            footprint = Footprint(process)
            return await _drive(ground, settings, load, tenants, events, footprint, lambda: check_alive([process]))
    finally:
        await log.delete_topics(cluster, f"{settings.deployment}.")


async def _drive(
    ground: Ground,
    settings: Settings,
    load: log.Load,
    tenants: Sequence[BenchTenant],
    events: int,
    footprint: Footprint,
    alive: Callable[[], None],
) -> LongRun:
    """Keep requests coming, end what is admitted, until every request has its decision."""
    found = LongRun()
    requests, results = _requests(list(tenants), events), _Results(tenants)
    decoder = msgspec.json.Decoder(_Decision)
    requests_topic = full_name(settings.deployment, "job-requests")
    results_topic = full_name(settings.deployment, "job-results")
    began_s = decided_s = sampled_s = time.monotonic()
    sent = 0
    async with log.reader(Cluster.of(settings), full_name(settings.deployment, "job-decisions")) as consumer:
        while found.events < events:
            ended: list[Keyed] = []
            for chunk in (await consumer.getmany(timeout_ms=100)).values():
                found.events += len(chunk)
                decisions = map(decoder.decode, (record.value for record in chunk))
                ended += [results.of(one.tenantid, one.data.job_id) for one in decisions if one.data.admitted]
                decided_s = time.monotonic()
            found.admitted += len(ended)
            fresh = list(islice(requests, CHUNK)) if sent - found.events < WINDOW else []
            sent += len(fresh)
            if ended or fresh:
                await load.append(results_topic, ended)
                await load.append(requests_topic, fresh)
                await load.commit()
            now_s = time.monotonic()
            if now_s - sampled_s >= SAMPLE_INTERVAL_S:
                alive()
                sampled_s = now_s
                found.samples.append((found.events, round(footprint.sample(), 1)))
                if len(found.samples) % SAY_EVERY == 0:
                    ground.say(f"long run: {found.events:,} of {events:,}, {found.samples[-1][1]:,.0f} MiB")
            if now_s - decided_s > STALL_S_MAX:
                raise UnavailableError(f"no decision for {STALL_S_MAX:.0f} s, after {found.events} of {events}")
    if found.events != events:
        raise StateError(f"{events} requests have {found.events} decisions")
    found.samples.append((found.events, round(footprint.sample(), 1)))
    found.seconds, found.peak_rss_mib = time.monotonic() - began_s, footprint.peak_mib
    return found


async def _create_topics(settings: Settings) -> None:
    declared = load_topology().declared(settings.deployment)
    bounded = {"segment.bytes": str(SEGMENT_BYTES), "retention.bytes": str(RETENTION_BYTES)}
    async with Cluster.of(settings).admin() as client:
        await broker.apply(client, [d.model_copy(update={"config": {**d.config, **bounded}}) for d in declared])


def _requests(tenants: list[BenchTenant], count: int) -> Iterator[Keyed]:
    """``count`` requests with ids of their own."""
    made = list(workload.requests(tenants, min(count, TEMPLATES), SEED))
    templates = [(keyed, keyed.value.split(_id_in(keyed.value))) for keyed in made]
    for number in range(count):
        keyed, parts = templates[number % len(templates)]
        yield Keyed(keyed.partition, keyed.key, f"{number:08x}-0000-7000-8000-000000000000".encode().join(parts))


def _id_in(value: bytes) -> bytes:
    start = value.index(_ID) + len(_ID)
    return value[start : start + 36]


class _Results:
    """Results as the scheduler writes them."""

    def __init__(self, tenants: Sequence[BenchTenant]) -> None:
        self._templates = {str(tenant.id): (tenant, self._template(tenant)) for tenant in tenants}

    def of(self, tenant_id: str, job_id: str) -> Keyed:
        """The result of one job."""
        tenant, parts = self._templates[tenant_id]
        return Keyed(tenant.partition, tenant.root.encode(), job_id.encode().join(parts))

    def _template(self, tenant: BenchTenant) -> list[bytes]:
        body = JobFinished(
            job_id=PLATFORM,
            status=JobStatus.SUCCEEDED,
            attempt=1,
            kind="reconciliation",
            requested_at_ms=0,
            finished_at_ms=0,
            worker_us=100_000,
        )
        event = envelope(body, event_id=PLATFORM, source=SOURCE, tenant=tenant.id, time=BEGINNING)
        return encode(event).split(PLATFORM.encode())
