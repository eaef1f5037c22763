"""Real services for tests: started at the first test that needs one, stopped at the end of the session.

``SETTLER_TEST_SERVICES`` chooses the provider: ``embedded`` (the default) or ``containers``.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
from functools import partial
from typing import TYPE_CHECKING

import asyncpg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as properties

from settler_streams.dev.stack.probes import apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.services.interface import Service, Services

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs with SIGINT ignored, and children would inherit that; some tests send it to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long one example takes says something of the machine and of who else is on it, and nothing of the code.
properties.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
properties.load_profile("any machine")


CALL_S_MAX = 30.0
"""Creating or dropping a database copies or deletes 8 MB."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: no process shall be left with one when the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    """All three, none of them started: ask for ``kafka``, ``postgres`` or ``valkey`` beside it."""
    provider = os.environ.get("SETTLER_TEST_SERVICES") or "embedded"
    if provider == "embedded":
        from tests.services.embedded import EmbeddedServices

        running: Services = EmbeddedServices()
    elif provider == "containers":
        from tests.services.containers import ContainerServices

        running = ContainerServices()
    else:
        pytest.fail(f"SETTLER_TEST_SERVICES is {provider!r}; it can be 'embedded' or 'containers'")
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def kafka(services: Services) -> Service:
    """Kafka, running."""
    services.kafka.start()
    return services.kafka


@pytest.fixture(scope="session")
def postgres(services: Services) -> Service:
    """PostgreSQL, running."""
    services.postgres.start()
    # Tests kill processes and no machine: what is written outlives them in the system's cache, and the disk may wait.
    for statement in ("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()"):
        apart(partial(_execute, services, statement))
    return services.postgres


@pytest.fixture(scope="session")
def valkey(services: Services) -> Service:
    """Valkey, running."""
    services.valkey.start()
    return services.valkey


@pytest.fixture(scope="module")
def deployment(request: pytest.FixtureRequest) -> str:
    """A ``settings.deployment`` that no other test module has: its topics, groups and transactions are its own."""
    stem = re.sub(r"[^a-z0-9]+", "-", request.path.stem.lower()).strip("-")
    return f"t-{stem[:24]}-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def database(services: Services, postgres: Service) -> Iterator[str]:
    """The owner's URL of an empty database that no other test module has; dropped after the module."""
    name = f"t_{secrets.token_hex(8)}"
    apart(lambda: _execute(services, f'CREATE DATABASE "{name}"'))
    try:
        yield services.settings.model_copy(update={"db_name": name}).postgres_url(owner=True)
    finally:
        services.postgres.start()  # a test may have left it stopped
        apart(lambda: _execute(services, f'DROP DATABASE "{name}" WITH (FORCE)'))


async def _execute(services: Services, statement: str) -> None:
    url = services.settings.model_copy(update={"db_name": "postgres"}).postgres_url(owner=True)
    connection = await asyncpg.connect(url, timeout=CALL_S_MAX)
    try:
        await connection.execute(statement, timeout=CALL_S_MAX)
    finally:
        await connection.close(timeout=CALL_S_MAX)
