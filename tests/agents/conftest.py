"""One deployment per test module: two partitions, a migrated database, and the apps in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import pytest_asyncio

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.ids import TenantId
from settler_streams.topology import load_topology
from settler_streams.workers.folds import new_app
from tests.runtime.apps import running
from tests.runtime.counter import tenant_in
from tests.runtime.kafka_log import KafkaLog
from tests.runtime.requests import register

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

PARTITIONS = 2
ROLES = ("admission", "scheduler", "recorder", "dead-letters")


@dataclass(frozen=True)
class Platform:
    """What a test of the agents needs."""

    log: KafkaLog
    pool: TenantConnectionPool
    tenants: tuple[TenantId, ...]
    """An Enterprise tenant for each partition, by number."""


@pytest.fixture(scope="module")
def settings(
    services: Services, kafka: Service, deployment: str, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Settings:
    """Settings of the module's own deployment, database and folder."""
    folder: Path = tmp_path_factory.mktemp("data")
    name = PurePosixPath(urlsplit(database).path).name
    return services.settings.model_copy(
        update={"deployment": deployment, "db_name": name, "data_dir": folder, "executor_slots": 2}
    )


@pytest_asyncio.fixture(scope="module")
async def platform(settings: Settings) -> AsyncIterator[Platform]:
    """The agents at work."""
    topology = load_topology().model_copy(update={"tenant_partitions": PARTITIONS})
    log = KafkaLog(settings, topology)
    await migrate(settings)
    await log.create()
    tenants = tuple(tenant_in(partition, 0, PARTITIONS) for partition in range(PARTITIONS))
    for partition, tenant in enumerate(tenants):
        await register(log, tenant, partition)
    pool = await TenantConnectionPool.open(settings)
    try:
        async with running([new_app(role, settings, topology, pool) for role in ROLES]):
            yield Platform(log, pool, tenants)
    finally:
        await pool.close()
