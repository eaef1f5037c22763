"""Whether a service answers a real client, with its password, right now."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import redis
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from redis.backoff import NoBackoff
from redis.retry import Retry

from settler_streams.dev.stack.process import accepts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

ANSWER_S_MAX = 5.0
"""One answer of a service that is up takes milliseconds; a JVM that has just started may pause for a second or two."""


def kafka_answers(host: str, port: int, cluster_id: str | None = None) -> bool:
    """Whether the broker is registered in its own metadata, so that topics can be created on it.

    Another cluster that has taken the port does not count, if ``cluster_id`` is given.
    """
    return accepts(host, port) and apart(lambda: _kafka_answers(f"{host}:{port}", cluster_id))


def postgres_answers(host: str, port: int, user: str, password: str) -> bool:
    """Whether the password opens a session that runs a statement.

    False while the server starts, and where some other server has the port, which is why it refuses the password.
    """
    return accepts(host, port) and apart(lambda: _postgres_answers(host, port, user, password))


def valkey_answers(host: str, port: int, password: str) -> bool:
    """Whether the server replies to an authenticated PING; some other server that has the port does not."""
    once = Retry(NoBackoff(), 0)
    client = redis.Redis(host=host, port=port, password=password, socket_timeout=ANSWER_S_MAX, retry=once)
    try:
        return bool(client.ping())
    except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
        return False  # not listening yet, loading, hanging, or not ours
    finally:
        client.close()


async def _kafka_answers(bootstrap: str, cluster_id: str | None) -> bool:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=int(ANSWER_S_MAX * 1000))
    try:
        async with asyncio.timeout(ANSWER_S_MAX):
            await admin.start()
            cluster = await admin.describe_cluster()
            return bool(cluster["brokers"]) and cluster_id in (None, cluster["cluster_id"])
    except (KafkaError, TimeoutError):
        return False
    finally:
        await admin.close()


async def _postgres_answers(host: str, port: int, user: str, password: str) -> bool:
    try:
        connection = await asyncpg.connect(
            host=host, port=port, user=user, password=password, database="postgres", timeout=ANSWER_S_MAX
        )
    except (asyncpg.CannotConnectNowError, asyncpg.InvalidPasswordError, OSError, TimeoutError):
        return False
    try:
        return bool(await connection.fetchval("SELECT 1", timeout=ANSWER_S_MAX) == 1)
    finally:
        await connection.close(timeout=ANSWER_S_MAX)


def apart(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end in a thread of its own, so that a caller inside an event loop may use this too."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(work()))
        except BaseException as error:  # noqa: BLE001 - carried to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, name="probe", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
