"""From Kafka to the endpoint: what the agent queues, exactly once, and a job whose result arrives."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.agents import webhooks as agent
from settler_streams.errors import FencedError
from settler_streams.events import (
    FlagAction,
    FlagChanged,
    FlagScope,
    JobFinished,
    Part,
    QuotaThreshold,
    QuotaType,
    TenantAcknowledged,
    TenantNoisy,
    TenantQuiet,
    decode,
)
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.runtime.projection import ProjectionSession, ProjectionSpec
from settler_streams.services.webhooks import WebhookService
from settler_streams.topology import load_topology
from settler_streams.workers.folds import new_app
from tests.executor.executors import executor_inside
from tests.runtime.apps import running
from tests.runtime.counter import arrived, tenant_in
from tests.runtime.kafka_log import KafkaLog
from tests.runtime.requests import event_bytes, job_request, new_id, register
from tests.webhooks.deliveries import courier, ended
from tests.webhooks.endpoint import listening

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.services.interface import Service

pytestmark = pytest.mark.services

PARTITIONS = 2
WINDOW = {"window_start_ms": 0, "window_ms": 1000}


@pytest_asyncio.fixture(scope="module")
async def log(kafka: Service, settings: Settings, pool: TenantConnectionPool) -> AsyncIterator[KafkaLog]:
    log = KafkaLog(settings, load_topology().model_copy(update={"tenant_partitions": PARTITIONS}))
    await log.create()
    yield log


async def stored_tenant(pool: TenantConnectionPool, tenant: TenantId) -> TenantId:
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
            tenant,
            f"t-{tenant}",
        )
    return tenant


async def step(session: ProjectionSession, records: Any) -> None:
    async with session.new_step(records) as working:
        for record in working.decode():
            working.write(agent.effects_of(record, working.raw))


async def test_public_events_are_queued_once_to_the_byte_and_others_are_not(
    log: KafkaLog, pool: TenantConnectionPool, service: WebhookService
) -> None:
    tenant = await stored_tenant(pool, tenant_in(0, 5, PARTITIONS))
    webhook_id = (await service.create(tenant, "https://hooks.example/")).webhook_id
    flag = FlagChanged(flag="f", scope=FlagScope.TENANT, action=FlagAction.SET, actor="me", version=1, changed_at_ms=1)
    quota = QuotaThreshold(quota=QuotaType.STORAGE, percent=90, used=9, limit=10, window_start_ms=0)
    public: list[tuple[str, Part]] = [
        ("tenant-signals", quota),
        ("tenant-signals", TenantNoisy(resource="r", used=9, others_average=1, tenants=3, **WINDOW)),
        ("tenant-signals", TenantQuiet(resource="r", window_start_ms=0)),
        ("flag-changes", flag),
    ]
    written = {}
    for topic, body in public:
        value = event_bytes(body, tenant)
        # Not as our encoder would write it: what is sent on has to be what lay there.
        written[decode(value).id] = value = value.replace(b'{"', b'{ "', 1)
        await log.append(topic, 0, [(tenant.encode(), value)])
    private = [event_bytes(TenantAcknowledged(version=1), tenant), event_bytes(public[1][1], PLATFORM), b"no event"]
    await log.append("tenant-signals", 0, [(tenant.encode(), value) for value in private])

    spec = ProjectionSpec(
        log.topology.projection("webhooks"), log.topology, Cluster.of(log.settings), log.settings.deployment, pool
    )
    sessions = [ProjectionSession(spec, 0) for _ in range(3)]
    try:
        for session in sessions[:2]:
            await session.open()
        records = await arrived(log, sessions[0])  # type: ignore[arg-type]
        await step(sessions[0], records)
        with pytest.raises(FencedError):
            await step(sessions[1], records)
        await sessions[2].open()
        assert await arrived(log, sessions[2]) == {}, "the position is behind them"  # type: ignore[arg-type]
    finally:
        for session in sessions:
            await session.close()
    async with pool.tenant(tenant) as tx:
        rows = await tx.fetch("SELECT event_id, body FROM webhook_deliveries WHERE webhook_id = $1", webhook_id)
    assert {str(row["event_id"]): row["body"].encode() for row in rows} == written
    letters = [dict(record.headers) for record in await log.read("dead-letters")]
    assert {letter["dl-role"] for letter in letters} == {b"webhooks"}


async def test_a_jobs_result_reaches_the_tenants_endpoint_and_no_others(
    log: KafkaLog, pool: TenantConnectionPool, settings: Settings, service: WebhookService, tmp_path: Path
) -> None:
    mine, theirs = [await stored_tenant(pool, tenant_in(number, 0, PARTITIONS)) for number in range(PARTITIONS)]
    for partition, tenant in enumerate((mine, theirs)):
        await register(log, tenant, partition)
    here = settings.model_copy(update={"data_dir": tmp_path, "executor_slots": 2})
    roles = ("admission", "scheduler", "webhooks")
    async with (
        listening() as endpoint,
        listening() as other,
        running([new_app(role, here, log.topology, pool) for role in roles]),
        executor_inside(here, log, "webhooks"),
        courier(pool, settings),
    ):
        issued = await service.create(mine, endpoint.url, ["settler.job.finished.v1"])
        await service.create(theirs, other.url)
        job_id, began_s = new_id(), time.time()
        request = event_bytes(job_request(), mine, event_id=job_id)
        await log.append("job-requests", 0, [(mine.encode(), request)])
        (sent,) = await endpoint.received(1)
        await ended(service, mine, issued.webhook_id, 1)
        assert other.connections == 0
    event = decode(sent.body)
    assert isinstance(event.data, JobFinished)
    assert (event.data.job_id, event.data.matches, event.tenantid) == (job_id, 1, mine)
    assert sent.signed_with(issued.secret)
    assert int(sent.headers["webhook-timestamp"]) >= int(began_s)
    (stored,) = [record.value for record in await log.read("job-results")]
    assert sent.body == stored
