"""The demo itself, against a system that is up: make tenants, submit, watch, and check."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.client import KafkaTransport, SettlerClient
from settler_streams.dev.demo import report
from settler_streams.dev.demo.check import check, positions
from settler_streams.dev.demo.load import Tally, submit_all
from settler_streams.dev.demo.noise import NoiseSeen, noise_of
from settler_streams.dev.demo.scenario import KILLED_FLAG, LOADS, ROWS_PER_SET, SEED, SETS_PER_TENANT
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.reconciliation.generator import generate
from settler_streams.services import TenantService, hash_password
from settler_streams.settings import Settings
from settler_streams.topology import full_name

MALFORMED = b'{"specversion": "1.0", "type": "settler.job.requested.v1", "data": '
"""A record cut off in the middle; some producer sends one some day."""
FLAG_DEADLINE_S = 20.0
"""Longest wait until the kill switch has reached admission; it takes some tens of milliseconds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the demo ended."""

    tallies: Sequence[Tally]
    noise: Sequence[NoiseSeen]
    problems: Sequence[str]
    seconds: float


async def run_demo(settings: Settings, console: Console) -> Outcome:
    """Run the whole scenario; :attr:`Outcome.problems` is empty when the check holds."""
    started = time.monotonic()
    transport = KafkaTransport(settings, source="/demo")
    pool = await TenantConnectionPool.open(settings)
    try:
        since = await positions(settings)
        tenants = await _create_tenants(settings, str(int(time.time())))
        for number, tenant in enumerate(tenants):
            await asyncio.to_thread(_write_record_sets, settings.record_sets_dir / tenant, SEED + number)
        tallies = [Tally(load, tenant) for load, tenant in zip(LOADS, tenants, strict=True)]
        async with SettlerClient(transport, PLATFORM) as operator:
            await _kill_previews(settings, operator)
            await _send_malformed(settings, tenants[0])
            async with _progress(console, tallies):
                await asyncio.gather(*(submit_all(SettlerClient(transport, t.tenant), t) for t in tallies))
            await operator.revive_flag(KILLED_FLAG, actor="demo", reason="the demo is over")
        noise = [seen for tally in tallies for seen in await noise_of(pool, tally.tenant)]
        verdict = await check(settings, pool, tenants, since, MALFORMED)
        console.print(report.final_table(tallies))
        report.say_noise(console, noise, {tally.tenant: tally.load.name for tally in tallies})
        report.say_check(console, verdict)
        return Outcome(tallies, noise, verdict.problems, time.monotonic() - started)
    finally:
        await pool.close()


async def _create_tenants(settings: Settings, run: str) -> list[TenantId]:
    """One tenant in each tier, through the tenant service; each is known to admission when this returns."""
    password_hash = await hash_password("demo-password")
    async with TenantService.connect(settings) as service:
        created = [
            await service.create_tenant(
                name=load.name,
                slug=f"{load.name.split()[0].lower()}-{run}",
                owner_email=f"owner@{load.name.split()[0].lower()}.example",
                owner_password_hash=password_hash,
                tier=load.tier,
            )
            for load in LOADS
        ]
    return [tenant.id for tenant, _owner in created]


def _write_record_sets(folder: Path, seed: int) -> None:
    for number in range(SETS_PER_TENANT):
        target = folder / f"demo-{number}"
        target.mkdir(parents=True, exist_ok=True)
        generate(seed * 100 + number, ROWS_PER_SET).write(target, "csv")


async def _kill_previews(settings: Settings, operator: SettlerClient) -> None:
    """Switch the kind off for everyone, and wait until the change stands in every partition that admission reads."""
    consumer = Cluster.of(settings).consumer(
        full_name(settings.deployment, "flag-state"),
        isolation_level="read_committed",
        auto_offset_reset="latest",
    )
    await consumer.start()
    try:
        await asyncio.gather(*(consumer.position(tp) for tp in consumer.assignment()))
        await operator.kill_flag(KILLED_FLAG, actor="demo", reason="shows a kill switch")
        waiting = {tp.partition for tp in consumer.assignment()}
        async with asyncio.timeout(FLAG_DEADLINE_S):
            async for record in consumer:
                waiting.discard(record.partition)
                if not waiting:
                    return
    finally:
        await consumer.stop()


async def _send_malformed(settings: Settings, tenant: TenantId) -> None:
    async with Cluster.of(settings).producer() as producer:
        await producer.send_and_wait(full_name(settings.deployment, "job-requests"), MALFORMED, key=tenant.encode())


@asynccontextmanager
async def _progress(console: Console, tallies: Sequence[Tally]) -> AsyncIterator[None]:
    """Show how far each tenant is: a live table on a terminal, a line every five seconds elsewhere."""
    watcher = asyncio.create_task(_watch(console, tallies))
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


async def _watch(console: Console, tallies: Sequence[Tally]) -> None:
    if console.is_terminal:
        with Live(report.progress_table(tallies), console=console, transient=True) as live:
            while True:
                await asyncio.sleep(0.25)
                live.update(report.progress_table(tallies))
    while True:
        await asyncio.sleep(5)
        parts = (f"{t.load.name.split()[0]} {t.finished}/{t.submitted}" for t in tallies)
        console.print("finished/submitted: " + ", ".join(parts))
