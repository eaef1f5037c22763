"""The fixtures give real services, each started only when asked for, and a private database and topic prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import pytest
import redis
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import NewTopic
from redis.backoff import NoBackoff
from redis.retry import Retry

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.settings import Settings

if TYPE_CHECKING:
    from tests.services.interface import Service, Services

pytestmark = pytest.mark.services


def test_deployment_is_a_valid_prefix(deployment: str) -> None:
    assert Settings(deployment=deployment).deployment == deployment


async def test_database_is_empty_and_its_owner_may_create(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        assert await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        await connection.execute("CREATE TABLE t (a int)")
        assert await connection.fetchval("SHOW server_version_num") >= "180000"
    finally:
        await connection.close()


async def test_postgres_refuses_a_wrong_password(services: Services, postgres: Service) -> None:
    settings = services.settings
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(
            host=settings.db_host, port=settings.db_port, user=settings.db_user, password="wrong", database="postgres"
        )


def test_postgres_keeps_its_data_and_address_through_a_kill(database: str, postgres: Service) -> None:
    from settler_streams.dev.stack.probes import apart

    async def run(statement: str) -> object:
        connection = await asyncpg.connect(database)
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    apart(lambda: run("CREATE TABLE kept AS SELECT 7 AS a"))
    postgres.kill()
    assert not postgres.running
    postgres.start()
    assert apart(lambda: run("SELECT a FROM kept")) == 7


def test_valkey_asks_for_the_password_and_survives_stop_and_pause(services: Services, valkey: Service) -> None:
    settings = services.settings
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(host=settings.redis_host, port=settings.redis_port, retry=Retry(NoBackoff(), 0)).ping()
    hasty, client = (
        redis.Redis.from_url(settings.redis_url(), socket_timeout=wait_s, retry=Retry(NoBackoff(), 0))
        for wait_s in (0.3, 30)
    )
    valkey.pause()
    with pytest.raises(redis.TimeoutError):
        hasty.ping()
    valkey.resume()
    valkey.stop()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    valkey.start()
    assert client.ping()


async def test_kafka_carries_a_transaction_to_a_read_committed_consumer(
    services: Services, kafka: Service, deployment: str
) -> None:
    bootstrap = services.settings.kafka_bootstrap_servers
    topic = f"{deployment}.t"
    async with Cluster.of(services.settings).admin() as admin:
        await admin.create_topics([NewTopic(topic, 1, 1)])
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=f"{deployment}-tx")
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(topic, b"committed")
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        assert (await consumer.getone()).value == b"committed"
    finally:
        await consumer.stop()


async def test_kafka_creates_no_topic_by_itself(services: Services, kafka: Service, deployment: str) -> None:
    async with Cluster.of(services.settings).admin() as admin:
        described = await admin.describe_topics([f"{deployment}.never-created"])
        assert described[0]["error_code"] == 3  # UNKNOWN_TOPIC_OR_PARTITION
        assert f"{deployment}.never-created" not in await admin.list_topics()
