"""A migrated database for each module, and tenants in it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from pydantic import SecretStr

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.core import webhooks as decisions
from settler_streams.courier import process
from settler_streams.ids import TenantId
from settler_streams.services.webhooks import WebhookService

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

KEY = "a1" * 32
NewTenant = Callable[[], Awaitable[TenantId]]


@pytest.fixture(scope="module")
def settings(services: Services, postgres: Service, deployment: str, database: str) -> Settings:
    """Settings of the module's own deployment and database; endpoints are on this machine."""
    return services.settings.model_copy(
        update={
            "deployment": deployment,
            "db_name": PurePosixPath(urlsplit(database).path).name,
            "webhook_keys": SecretStr(f"one:{KEY}"),
            "webhook_allow_private": True,
            "webhook_timeout_s": 1,
        }
    )


@pytest_asyncio.fixture(scope="module")
async def pool(settings: Settings) -> AsyncIterator[TenantConnectionPool]:
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def new_tenant(pool: TenantConnectionPool) -> AsyncIterator[NewTenant]:
    """Inserts a tenant, in its own context. Its webhooks end with the test: a courier of the next would serve them."""
    made: list[TenantId] = []

    async def create() -> TenantId:
        tenant_id = TenantId(str(uuid.uuid4()))
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(
                "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
                tenant_id, f"t-{tenant_id}",
            )  # fmt: skip
        made.append(tenant_id)
        return tenant_id

    yield create
    for tenant_id in made:
        async with pool.tenant(tenant_id) as tx:
            await tx.execute("DELETE FROM webhooks")
            await tx.execute("DELETE FROM webhook_lanes")


@pytest.fixture
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Couriers' seconds become hundredths; nothing else changes."""
    monkeypatch.setattr(decisions, "BACKOFF_MIN_S", 0.05)
    monkeypatch.setattr(decisions, "LANE_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(process, "POLL_S", 0.02)


@pytest.fixture
def service(pool: TenantConnectionPool, settings: Settings) -> WebhookService:
    return WebhookService(pool, settings)
