"""``settler tenants webhooks`` against a real database, with a courier and an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from settler_streams.adapters.kafka.broker import apply
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.ids import TenantId, uuid7
from settler_streams.topology import load_topology
from tests.cli.in_process import invoke
from tests.webhooks.courier_processes import courier_process
from tests.webhooks.deliveries import finished, queue
from tests.webhooks.endpoint import listening, status

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.adapters.postgres.pool import TenantConnectionPool
    from settler_streams.settings import Settings
    from tests.services.interface import Service
    from tests.webhooks.conftest import NewTenant

pytestmark = pytest.mark.services

Cli = Callable[..., Awaitable[tuple[int, Any]]]
CLI_S_MAX = 100.0


@pytest.fixture
def cli(settings: Settings, tmp_path: Path) -> Cli:
    async def run(*arguments: str) -> tuple[int, Any]:
        known = {**settings.environment(), "SETTLER_STATE_DIR": str(tmp_path / "none")}
        async with asyncio.timeout(CLI_S_MAX):
            code, printed, _ = await asyncio.to_thread(invoke, ["tenants", "webhooks", *arguments], known)
        return code, printed

    return run


@pytest_asyncio.fixture
async def topics(kafka: Service, settings: Settings) -> None:
    """To which changes are told."""
    async with Cluster.of(settings).admin() as client:
        await apply(client, load_topology().declared(settings.deployment))


@pytest.mark.usefixtures("topics")
async def test_a_webhooks_life(
    cli: Cli, pool: TenantConnectionPool, settings: Settings, new_tenant: NewTenant, tmp_path: Path
) -> None:
    tenant = await new_tenant()
    assert await cli("list", tenant) == (0, [])
    async with listening() as endpoint, courier_process(settings, tmp_path / "log"):
        code, issued = await cli("add", tenant, endpoint.url, "--event", "settler.job.finished.v1")
        assert code == 0
        webhook = issued["webhook_id"]
        code, tested = await cli("test", tenant, webhook)
        assert (code, tested["status"], tested["event_type"]) == (0, "delivered", "settler.webhook.test.v1")
        assert endpoint.requests[0].signed_with(issued["secret"])
        code, rotated = await cli("rotate", tenant, webhook, "--overlap", "60")
        assert code == 0
        endpoint.otherwise = status(410)
        event = finished(tenant)
        await queue(pool, event)
        (_, sent) = await endpoint.received(2)
        assert sent.signed_with(issued["secret"])
        assert sent.signed_with(rotated["secret"])
        code, refused = await cli("test", tenant, webhook)
        assert (code, refused) == (4, None), "disabled by the 410"
        endpoint.otherwise = status(200)
        code, (listed,) = await cli("list", tenant)
        assert (listed["status"], listed["disabled_reason"], listed["url"]) == ("disabled", "gone", endpoint.url)
        code, resumed = await cli("resume", tenant, webhook)
        assert (code, resumed["status"]) == (0, "active")
        code, (dead,) = await cli("deliveries", tenant, webhook, "--status", "dead")
        assert (dead["event_id"], dead["last_status"]) == (event.event_id, 410)
        assert await cli("redrive", tenant, webhook, event.event_id) == (0, {"redriven": [event.event_id]})
        (*_, again) = await endpoint.received(3)
        assert again.event_id == event.event_id
        assert (await cli("pause", tenant, webhook))[1]["status"] == "paused"
    assert await cli("remove", tenant, webhook) == (0, {"removed": webhook})
    assert await cli("list", tenant) == (0, [])


@pytest.mark.usefixtures("topics")
async def test_a_test_that_nobody_sends_says_so(cli: Cli, new_tenant: NewTenant) -> None:
    tenant = await new_tenant()
    _, issued = await cli("add", tenant, "https://hooks.example/")
    code, delivery = await cli("test", tenant, issued["webhook_id"], "--wait", "0")
    assert (code, delivery["status"], delivery["attempts"]) == (3, "pending", 0)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("add", "no-tenant", "https://hooks.example/"), 4),
        (("add", uuid7(1), "https://hooks.example/"), 4),
        (("add", uuid7(1), "ftp://hooks.example/"), 4),
        (("add", uuid7(1), "https://hooks.example/", "--event", "settler.tenant.usage.v1"), 2),
        (("remove", uuid7(1), uuid7(2)), 4),
        (("redrive", uuid7(1), uuid7(2)), 4),
        (("redrive", uuid7(1), uuid7(2), "--all"), 4),
        (("deliveries", uuid7(1), "no-webhook"), 4),
    ],
)
async def test_bad_input_has_a_code(
    cli: Cli, pool: TenantConnectionPool, arguments: tuple[str | TenantId, ...], code: int
) -> None:
    assert pool
    assert await cli(*arguments) == (code, None)
