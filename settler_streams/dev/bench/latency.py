"""From request to result over all hops, as a client of the SDK sees it: when the system is idle, and at half its load.

A job goes through admission, the scheduler, an executor, the scheduler again, and back to admission and the client. Its
record sets are small and lie in the request, so that the time is the stream's and not the job's.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.client import KafkaTransport, SettlerClient
from settler_streams.dev.bench import log, workload
from settler_streams.dev.bench.ground import READY_S_MAX, SEED, Ground
from settler_streams.dev.bench.hops import Seen, medians_ms
from settler_streams.dev.bench.workload import BenchTenant
from settler_streams.errors import StateError, UnavailableError
from settler_streams.events import InlineRecords, JobStatus, TenantTier
from settler_streams.services import TenantService, hash_password
from settler_streams.settings import Settings
from settler_streams.topology import full_name

TENANTS = 100
"""Of them the Scale and Growth tenants submit, whose limits do not bite."""
ROWS = 5
ANSWER_S_MAX = 120.0
"""Longest wait for one result: that of the last job of the burst on a machine that does little else but other work."""
WARM_UP_JOBS = 20
IDLE_PAUSE_S = (0.05, 0.15)
"""Between a result and the next request, drawn anew each time, so that no phase of any poll is favoured."""
PACED_JOBS_MIN = 2
"""Fewer have no percentile; a very slow machine sends them late rather than not at all."""
ALL_S_MAX = ANSWER_S_MAX + 5.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many jobs are sent one after the other, how often a tenant is changed then, how many jobs are sent at once to
    learn the capacity, and for how long at half of that."""

    idle_jobs: int = 80
    tenant_changes: int = 50
    burst_jobs: int = 200
    half_load_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Every job, what each change of a tenant took, the jobs per second that the system finished in a burst, and the
    medians of the hops."""

    idle: Sequence[Seen]
    tenant_changes_ms: Sequence[float]
    half_load: Sequence[Seen]
    capacity_per_s: float
    idle_hops_ms: Mapping[str, float]
    half_load_hops_ms: Mapping[str, float]


async def measure(ground: Ground, sizes: Sizes) -> Latencies:
    """Start a worker with every role and an executor, and send them jobs.

    Raises:
        StateError: a job was refused or failed.
        UnavailableError: there was no result in time.
    """
    settings = await asyncio.to_thread(ground.system.up, executors=1, workers=1, gateway=False)
    tenants = workload.tenants(TENANTS, ground.topology.tenant_partitions, SEED)
    await _register(settings, tenants)
    busy = [t for t in tenants if t.share.tier in (TenantTier.SCALE, TenantTier.GROWTH)]
    transport = KafkaTransport(settings, source="/bench/client")
    clients = [SettlerClient(transport, tenant.id, root=tenant.root) for tenant in busy]
    async with clients[0]:
        await _one_by_one(clients, WARM_UP_JOBS)
        idle = await _one_by_one(clients, sizes.idle_jobs)
        changes_ms = await _changes(settings, sizes.tenant_changes)
        capacity = await _burst(clients, sizes.burst_jobs)
        half_load = await _paced(clients, capacity / 2, sizes.half_load_s)
    hops = [await medians_ms(settings, jobs) for jobs in (idle, half_load)]
    return Latencies(idle, changes_ms, half_load, capacity, *hops)


def percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    cuts = statistics.quantiles(values_ms, n=100, method="inclusive")
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


async def _register(settings: Settings, tenants: list[BenchTenant]) -> None:
    """Make the tenants known to admission; return when every fold has read of them."""
    cluster, topic = Cluster.of(settings), full_name(settings.deployment, "tenant-changes")
    changes = list(workload.tenant_changes(tenants))
    async with log.Load(cluster, f"{settings.deployment}.tenants") as load:
        await load.append(topic, changes)
        await load.commit()
    group = f"{settings.deployment}.admission"
    await log.wait_committed(cluster, group, log.ends_of(topic, changes), READY_S_MAX, lambda: None)


async def _job(client: SettlerClient) -> Seen:
    """Submit one job and wait for its result."""
    rows = tuple(
        {"id": str(n), "amount": f"{n}.00", "currency": "EUR", "date": "2026-01-05", "reference": f"R{n}"}
        for n in range(ROWS)
    )
    submitted_ms = time.time() * 1000
    job = await client.submit(left=InlineRecords(rows=rows), right=InlineRecords(rows=rows))
    result = await job.result(ANSWER_S_MAX)
    answered_ms = time.time() * 1000
    if result.status is not JobStatus.SUCCEEDED or result.matches != ROWS:
        raise StateError(f"job {job.id} should match {ROWS} rows: {result}")
    return Seen(job.id, submitted_ms, answered_ms)


async def _one_by_one(clients: Sequence[SettlerClient], jobs: int) -> list[Seen]:
    drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    spent = []
    for number in range(jobs):
        spent.append(await _job(clients[number % len(clients)]))
        await asyncio.sleep(drawn.uniform(*IDLE_PAUSE_S))
    return spent


async def _changes(settings: Settings, changes: int) -> list[float]:
    """Milliseconds from a new tier, asked for, to admission's word that its state has it."""
    took_ms = []
    async with TenantService.connect(settings) as service:
        password_hash = await hash_password(secrets.token_urlsafe())
        created = await service.create_tenant(
            name="Changing", slug="changing", owner_email="owner@example.com", owner_password_hash=password_hash
        )
        for number in range(changes):
            began_s = time.perf_counter()
            await service.change_tier(created.tenant.id, (TenantTier.SCALE, TenantTier.GROWTH)[number % 2])
            took_ms.append((time.perf_counter() - began_s) * 1e3)
    return took_ms


async def _burst(clients: Sequence[SettlerClient], jobs: int) -> float:
    """Jobs per second when all are there at once."""
    began_s = time.perf_counter()
    await _all([_job(clients[number % len(clients)]) for number in range(jobs)])
    return jobs / (time.perf_counter() - began_s)


async def _paced(clients: Sequence[SettlerClient], per_second: float, seconds: float) -> list[Seen]:
    """Requests that come at random times (a Poisson process), whatever has become of the earlier ones."""
    drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    loop = asyncio.get_running_loop()
    at_s = loop.time()
    end_s = at_s + seconds
    jobs: list[asyncio.Task[Seen]] = []
    while (at_s := at_s + drawn.expovariate(per_second)) < end_s or len(jobs) < PACED_JOBS_MIN:
        await asyncio.sleep(max(0.0, at_s - loop.time()))
        jobs.append(asyncio.create_task(_job(clients[len(jobs) % len(clients)])))
    return await _all(jobs)


async def _all(jobs: Sequence[Awaitable[Seen]]) -> list[Seen]:
    try:
        async with asyncio.timeout(ALL_S_MAX):
            return list(await asyncio.gather(*jobs))
    except TimeoutError as error:
        raise UnavailableError(f"{len(jobs)} jobs were not done in {ALL_S_MAX:.0f} s") from error
