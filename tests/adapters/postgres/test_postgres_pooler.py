"""Behind PgBouncer in transaction mode: two sessions of the server serve all connections of the application.

It does not reset sessions in this mode, so whatever one tenant's transaction leaves in a session is there for the next
tenant's. What the recorder, the outbox and the results' readers do is done once more behind it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.dev.stack.ports import free_port
from settler_streams.dev.stack.postgres import unprivileged_account
from settler_streams.dev.stack.process import ChildProcess
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings
from tests.adapters.postgres.test_postgres_batches import *  # noqa: F403
from tests.adapters.postgres.test_postgres_outbox import *  # noqa: F403
from tests.adapters.postgres.test_postgres_projection import *  # noqa: F403
from tests.adapters.postgres.test_postgres_results import *  # noqa: F403

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [pytest.mark.services, pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")]

SESSIONS = 2
"""Of the server, for one database and one login."""
CONNECTIONS = 20
START_S_MAX = 60.0
BACKEND = "SELECT pg_backend_pid()"

CONFIGURATION = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {logins}
pool_mode = transaction
default_pool_size = {sessions}
"""


class Pooler(NamedTuple):
    """The running process, and the port it listens on."""

    process: ChildProcess
    port: int

    def start(self) -> None:
        """Have it listening."""
        self.process.start()
        self.process.wait_for_port(self.port, deadline_s=START_S_MAX)


@pytest.fixture(scope="module")
def pooler(cluster_settings: Settings) -> Iterator[Pooler]:
    """PgBouncer in front of the cluster, for any database and the two logins."""
    assert PGBOUNCER is not None
    with tempfile.TemporaryDirectory(prefix="settler-pgbouncer-") as name:
        home, port = Path(name), free_port()
        home.chmod(0o755)
        (home / "logins").write_text(
            f'"{cluster_settings.db_user}" "{cluster_settings.db_password.get_secret_value()}"\n'
            f'"{cluster_settings.db_app_user}" "{cluster_settings.db_app_password.get_secret_value()}"\n'
        )
        (home / "pgbouncer.ini").write_text(
            CONFIGURATION.format(
                host=cluster_settings.db_host, port=cluster_settings.db_port,
                listen_port=port, logins=home / "logins", sessions=SESSIONS,
            )
        )  # fmt: skip
        process = ChildProcess(
            "pgbouncer", [PGBOUNCER, str(home / "pgbouncer.ini")], log=home / "log", cwd=home,
            account=unprivileged_account() if os.geteuid() == 0 else None,  # it refuses to run as root
        )  # fmt: skip
        pooler = Pooler(process, port)
        pooler.start()
        try:
            yield pooler
        finally:
            process.stop(deadline_s=START_S_MAX)


@pytest.fixture
def pooled_settings(database_settings: Settings, pooler: Pooler) -> Settings:
    """As the runbook has them: no prepared statement outlives its transaction."""
    return database_settings.model_copy(
        update={
            "db_host": "127.0.0.1",
            "db_port": pooler.port,
            "db_statement_cache_size": 0,
            "db_pool_size": CONNECTIONS,
            "db_pool_wait_ms": 60_000,
        }
    )


@pytest_asyncio.fixture
async def pool(pooled_settings: Settings) -> AsyncIterator[TenantConnectionPool]:
    """Takes the place of the direct one, in this module and in what it has taken over."""
    pool = await TenantConnectionPool.open(pooled_settings)
    yield pool
    await pool.close()


async def test_many_tenants_share_two_sessions_and_each_sees_its_own(pool, create_tenant):
    tenants = [await create_tenant() for _ in range(CONNECTIONS)]
    served: dict[int, set[str]] = {}

    async def work(tenant_id):
        for number in range(10):
            async with pool.tenant(tenant_id) as tx:
                served.setdefault(await tx.fetchval(BACKEND), set()).add(tenant_id)
                await tx.execute("UPDATE tenants SET name = $1", f"{tenant_id} {number}")
                assert await TenantContext.read(tx) == tenant_id
                assert [row["name"] for row in await tx.fetch("SELECT name FROM tenants")] == [f"{tenant_id} {number}"]

    await asyncio.gather(*(work(tenant_id) for tenant_id in tenants))
    assert len(served) <= SESSIONS
    assert any(len(there) > 1 for there in served.values())


@pytest.mark.parametrize(
    "leave",
    [
        "SET app.tenant_id = '{}'",
        "SET ROLE settler_relay",
        "SET ROLE settler_courier",
        "SET ROLE settler_janitor",
        "SET ROLE settler_eraser",
        "SET search_path = x",
    ],
)
async def test_what_one_transaction_leaves_in_a_session_does_not_reach_the_next(pool, create_tenant, leave):
    """The pool sees it in no session but the one that its check happens to get."""
    careless, other = await create_tenant(), await create_tenant()
    left = set()
    while len(left) < SESSIONS:  # by a connection each, or the same session would serve again
        async with pool.tenant(careless) as one, pool.tenant(careless) as two:
            for tx in (one, two):
                await tx.execute(leave.format(careless))
                left.add(await tx.fetchval(BACKEND))
    for _ in range(4):
        async with pool.tenant(other) as one, pool.tenant(other) as two:
            for tx in (one, two):
                assert await tx.fetchval(BACKEND) in left
                assert await tx.fetchval("SELECT current_user = session_user")
                assert [row["id"] for row in await tx.fetch("SELECT id::text FROM tenants")] == [other]


async def test_a_pooler_that_is_gone_is_unavailable_and_its_return_is_noticed(pool, pooler, create_tenant):
    tenant_id = await create_tenant()
    pooler.process.kill()
    try:
        with pytest.raises(UnavailableError):
            async with pool.tenant(tenant_id):
                pass
    finally:
        pooler.start()
    async with pool.tenant(tenant_id) as tx:
        assert await tx.fetchval("SELECT count(*) FROM tenants") == 1
