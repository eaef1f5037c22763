"""How fast a worker that starts anew has its state back; run as a module, this is the worker.

The changelog holds the state of a busy admission role: in each of its folds open jobs, tenants and
their usage, one record per key, encoded as the step encodes them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator

import uvloop

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.agents import admission
from settler_streams.core.fold import Value
from settler_streams.core.quotas import Limits, Reservation, Tenant, new_usage
from settler_streams.dev.bench import log, workload
from settler_streams.dev.bench.ground import SEED, TENANTS, Ground, running
from settler_streams.dev.bench.workload import BEGINNING, SOURCE, BenchTenant, Keyed
from settler_streams.errors import StateError
from settler_streams.events import TenantStatus
from settler_streams.runtime.state import StateCodec
from settler_streams.settings import Settings
from settler_streams.tiers import load_tiers
from settler_streams.topology import full_name, load_topology
from settler_streams.workers.folds import fold_app

WORK_S_MAX = 120.0
"""Ten times what a million keys take on a slow machine."""
DONE = "bench recovered"


async def measure(ground: Ground, keys: int) -> float:
    """Keys per second: from opening the first of a worker's folds, side by side, until the last could process.

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
    return float(keys / found["seconds"])


def state(keys: int, partitions: int) -> Iterator[Keyed]:
    """``keys`` changelog records of an admission role, in all of its partitions."""
    codec = StateCodec(admission.KINDS)
    drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    tenants = workload.tenants(min(TENANTS, keys // 4), partitions, SEED)
    now_ms = int(BEGINNING.timestamp() * 1000)

    def put(tenant: BenchTenant, key: str, value: Value) -> Keyed:
        return Keyed(tenant.partition, key.encode(), codec.encode(value))

    for tenant in tenants:
        known = Tenant(1, tenant.share.tier, TenantStatus.ACTIVE, tenant.root, tenant.parent, {}, None)
        yield put(tenant, f"tenant/{tenant.id}", known)
        yield put(tenant, f"usage/{tenant.id}", new_usage(Limits.of(known, load_tiers()), now_ms))
    rest = keys - 2 * len(tenants)
    for number in range(rest):
        tenant = tenants[number % len(tenants)]
        chain = (tenant.id,) if tenant.parent is None else (tenant.id, tenant.parent)
        yield put(tenant, f"job/{workload.uuid_of(drawn)}", Reservation(tenant.id, chain, now_ms, SOURCE))


async def recover(settings: Settings) -> dict[str, float]:
    """Open all admission folds in this process, and close them again."""
    topology = load_topology()
    app = fold_app(admission.ROLE, settings, topology)
    sessions = [app.new_session(partition) for partition in range(topology.tenant_partitions)]
    began_s = time.perf_counter()
    await asyncio.gather(*(session.open() for session in sessions))
    seconds = time.perf_counter() - began_s
    keys = sum(len(session.state) for session in sessions)
    await asyncio.gather(*(session.close() for session in sessions))
    return {"keys": keys, "seconds": seconds}


def main() -> None:
    """Recover once and say how long it took. Settings come from the environment."""
    found = uvloop.run(recover(Settings.from_environment()))
    print(json.dumps({"event": DONE, **found}), flush=True)  # noqa: T201 - the parent waits for this line


if __name__ == "__main__":
    main()
