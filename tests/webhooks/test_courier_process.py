"""The courier as a process: killed between sending and recording, told to stop, and what it writes to its log."""

from __future__ import annotations

import asyncio
import base64
import signal
from typing import TYPE_CHECKING

import asyncpg
import pytest

from settler_streams.services.webhooks import WebhookService
from tests.webhooks.conftest import KEY
from tests.webhooks.courier_processes import courier_process
from tests.webhooks.deliveries import ended, finished, queue
from tests.webhooks.endpoint import WAIT_S_MAX, hang, listening, status

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services


async def test_a_courier_that_is_killed_after_sending_loses_nothing_and_repeats_the_id(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant, tmp_path: Path
) -> None:
    tenant = await new_tenant()
    event = finished(tenant)
    owner = await asyncpg.connect(settings.postgres_url(owner=True))
    async with listening() as endpoint:
        issued = await service.create(tenant, endpoint.url)
        await queue(pool, event)
        async with courier_process(settings, tmp_path / "first.log") as first:
            blocking = owner.transaction()
            await blocking.start()
            # Recording the answer has to wait for this row, and so it is there that the courier dies.
            await owner.execute("SELECT FROM webhook_deliveries WHERE event_id = $1 FOR UPDATE", event.event_id)
            await endpoint.received(1)
            async with asyncio.timeout(WAIT_S_MAX):
                while not await owner.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                    "AND query LIKE '%UPDATE webhook_deliveries%' AND datname = current_database()"
                ):
                    await owner.execute("SELECT pg_stat_clear_snapshot()")
            first.send_signal(signal.SIGKILL)
            await first.wait()
            await blocking.rollback()
        await owner.close()
        (left,) = await service.deliveries.recent(tenant, issued.webhook_id)
        assert (left.status, left.attempts) == ("pending", 0)
        async with pool.tenant(tenant) as tx:  # as if the time of its lease had passed
            leased = await tx.fetchval("SELECT leased_until > now() FROM webhook_lanes")
            await tx.execute("UPDATE webhook_lanes SET leased_until = now()")
        assert leased, "until then the lane is the dead courier's"

        async with courier_process(settings, tmp_path / "second.log"):
            requests = await endpoint.received(2)
            (delivery,) = await ended(service, tenant, issued.webhook_id, 1)
    assert {(request.event_id, request.body) for request in requests} == {(event.event_id, event.body.encode())}
    assert delivery.attempts == 1
    logs = (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert "courier ready" in logs
    secret = base64.b64decode(issued.secret.removeprefix("whsec_"))
    for hidden in (issued.secret.removeprefix("whsec_")[:20], secret.hex(), KEY, settings.postgres_url()):
        assert hidden not in logs


async def test_a_courier_that_is_told_to_stop_ends_what_is_under_way(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant, tmp_path: Path
) -> None:
    tenant, late = await new_tenant(), await new_tenant()

    async def when_released(endpoint, writer) -> None:
        await endpoint.released.wait()
        await status(200)(endpoint, writer)

    patient = settings.model_copy(update={"webhook_timeout_s": 30})
    async with (
        listening(otherwise=when_released) as endpoint,
        listening(otherwise=hang) as unasked,
        courier_process(patient, tmp_path / "log") as process,
    ):
        issued = await service.create(tenant, endpoint.url)
        await queue(pool, finished(tenant))
        await endpoint.received(1)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S_MAX):
            while "stopping" not in await asyncio.to_thread((tmp_path / "log").read_text):
                pass
        await service.create(late, unasked.url)
        await queue(pool, finished(late))
        endpoint.released.set()
        assert await process.wait() == 0
        assert unasked.connections == 0
    (delivery,) = await service.deliveries.recent(tenant, issued.webhook_id)
    assert (delivery.status, delivery.attempts) == ("delivered", 1)
    async with pool.tenant(tenant) as tx:
        assert await tx.fetchval("SELECT count(*) FROM webhook_lanes WHERE leased_until > now()") == 0
