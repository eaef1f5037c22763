"""Webhooks of a tenant that has a schema of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from settler_streams.adapters.postgres.tenant_schemas import move
from settler_streams.services.webhooks import WebhookService
from tests.webhooks.deliveries import courier, ended, finished, queue
from tests.webhooks.endpoint import listening

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services


async def test_webhooks_move_with_their_tenant_and_are_served_wherever_they_are(
    pool: TenantConnectionPool, settings: Settings, service: WebhookService, new_tenant: NewTenant
) -> None:
    tenant, other = await new_tenant(), await new_tenant()
    async with listening() as endpoint, listening() as elsewhere:
        before = await service.create(tenant, endpoint.url)
        await service.create(other, elsewhere.url)
        waiting = finished(tenant)
        await queue(pool, waiting)
        assert await move(settings, tenant, own_schema=True) > 0
        inside = await service.create(tenant, endpoint.url)
        async with courier(pool, settings):
            event = finished(tenant)
            await queue(pool, event, finished(other))
            await ended(service, tenant, before.webhook_id, 2)
            await ended(service, tenant, inside.webhook_id, 1)
            await elsewhere.received(1)
        async with pool.tenant(tenant) as tx:
            assert await tx.fetchval("SELECT count(*) FROM public.webhook_deliveries") == 0
        await service.delete(tenant, inside.webhook_id)
        assert await move(settings, tenant, own_schema=False) > 0
        async with courier(pool, settings):
            await queue(pool, finished(tenant))
            await ended(service, tenant, before.webhook_id, 3)
    sent = [request.event_id for request in endpoint.requests]
    assert sorted(sent[:3]) == sorted([waiting.event_id, event.event_id, event.event_id])
    assert len(sent) == 4
    assert [webhook.id for webhook in await service.list(tenant)] == [before.webhook_id]
