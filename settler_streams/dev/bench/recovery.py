"""How fast a worker that starts anew has its state back; run as a module, this is the worker.

The changelog holds the state of an admission role with many tenants and a full pool, one record per key, encoded as
the step encodes it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import uvloop

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.agents import admission
from settler_streams.core.dedup import CHUNK_IDS_MAX, SeenIds
from settler_streams.core.open_jobs import Reservations
from settler_streams.core.quotas import Limits, Tenant, new_usage
from settler_streams.dev.bench import log, workload
from settler_streams.dev.bench.ground import SEED, Ground, running
from settler_streams.dev.bench.workload import BEGINNING, SOURCE, Keyed
from settler_streams.errors import StateError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId
from settler_streams.runtime.state import StateCodec
from settler_streams.settings import Settings
from settler_streams.tiers import load_tiers
from settler_streams.topology import full_name, load_topology
from settler_streams.workers.folds import fold_app
from settler_streams.workers.run import COLLECT_AFTER

WORK_S_MAX = 120.0
"""Ten times what a million keys take on a slow machine."""
DONE = "bench recovered"
IDS_PER_CHUNK = CHUNK_IDS_MAX


@dataclass(frozen=True, slots=True)
class Recovered:
    """How long the keys took, and how much of a processor."""

    keys: int
    seconds: float
    cpu_s: float

    @property
    def keys_per_s(self) -> float:
        """The rate."""
        return self.keys / self.seconds


async def measure(ground: Ground, keys: int) -> Recovered:
    """From opening the first of a worker's folds, side by side, until the last could process.

    Raises:
        StateError: the folds do not hold exactly the keys that were written.
    """
    settings = ground.deployment("recovery")
    cluster = Cluster.of(settings)
    await log.create_declared(settings)
    try:
        changelog = full_name(settings.deployment, ground.topology.fold(admission.ROLE).changelog)
        async with log.Load(cluster, f"{settings.deployment}.load") as load:
            await load.append(changelog, state(keys, ground.topology.tenant_partitions))
            await load.commit()
        process = ground.process(settings, "worker", __name__)
        async with running([process]):
            await asyncio.to_thread(process.wait_for_line, DONE, deadline_s=WORK_S_MAX)
        found = json.loads(next(line for line in process.log.read_text().splitlines() if DONE in line))
    finally:
        await log.delete_topics(cluster, f"{settings.deployment}.")
    if found["keys"] != keys:
        raise StateError(f"{keys} keys were written, {found['keys']} recovered")
    return Recovered(keys, found["seconds"], found["cpu_s"])


def state(keys: int, partitions: int) -> Iterator[Keyed]:
    """``keys`` changelog records of an admission role, spread evenly over its partitions.

    A tenth are open jobs, one by itself as quiet times store them, whose ids are remembered in chunks; the others are
    tenants and what each has used.
    """
    codec = StateCodec(admission.KINDS)
    drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    now_ms = int(BEGINNING.timestamp() * 1000)
    jobs = keys // 10
    chunks = -(-(jobs + 1) // IDS_PER_CHUNK)  # one more may be left over from the tenants, who come in pairs
    tenants = (keys - jobs - chunks) // 2
    jobs = keys - chunks - 2 * tenants
    ids = [TenantId(workload.uuid_of(drawn)) for _ in range(tenants)]
    for number, tenant in enumerate(ids):
        known = Tenant(1, workload.MIX[number % len(workload.MIX)].tier, TenantStatus.ACTIVE, tenant, None, {}, None)
        usage = new_usage(Limits.of(known, load_tiers()), now_ms)
        for kind, value in (("tenant", known), ("usage", usage)):
            yield Keyed(number % partitions, f"{kind}/{tenant}".encode(), codec.encode(value))
    for chunk in range(chunks):
        partition, first = chunk % partitions, chunk * IDS_PER_CHUNK
        entries = []
        for offset in range(first, min(first + IDS_PER_CHUNK, jobs)):
            job_id, tenant = workload.uuid_of(drawn), ids[partition]
            entries.append((job_id, 0, now_ms))
            held = Reservations(tenant, (tenant,), SOURCE, (job_id,))
            yield Keyed(partition, f"jobs/{offset}".encode(), codec.encode(held))
        seen = SeenIds(chunk // partitions * IDS_PER_CHUNK, ((SOURCE, ids[partition]),), tuple(entries))
        yield Keyed(partition, f"seen/{seen.number:016}".encode(), codec.encode(seen))


async def recover(settings: Settings) -> dict[str, float]:
    """Open all admission folds in this process, and close them again."""
    gc.set_threshold(*COLLECT_AFTER)  # as a worker does
    topology = load_topology()
    app = fold_app(admission.ROLE, settings, topology)
    sessions = [app.new_session(partition) for partition in range(topology.tenant_partitions)]
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(session.open() for session in sessions))
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    keys = sum(len(session.state) for session in sessions)
    await asyncio.gather(*(session.close() for session in sessions))
    return {"keys": keys, "seconds": seconds, "cpu_s": cpu_s}


def main() -> None:
    """Recover once and say how long it took. Settings come from the environment."""
    found = uvloop.run(recover(Settings.from_environment()))
    print(json.dumps({"event": DONE, **found}), flush=True)  # noqa: T201 - the parent waits for this line


if __name__ == "__main__":
    main()
