"""Kafka is for trusted services: TLS, a login per role, and no right that the topology does not give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError
from aiokafka.structs import TopicPartition
from pydantic import SecretStr

from settler_streams.adapters.kafka import acls, dead_letter_removal, dead_letters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import Selection
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.client import SettlerClient
from settler_streams.client.kafka import KafkaTransport
from settler_streams.errors import UnavailableError
from settler_streams.events import InlineRecords
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from settler_streams.workers.folds import ROLES, new_app
from tests.executor.executors import executor_inside
from tests.runtime.apps import running
from tests.runtime.counter import tenant_in
from tests.runtime.kafka_log import KafkaLog
from tests.runtime.requests import ROW, register
from tests.services.secured import ADMIN, SecuredKafka, secured_kafka

if TYPE_CHECKING:
    from tests.services.interface import Service, Services

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(240)]

PARTITIONS = 2
SDK = "an-sdk"
"""One login that plays two roles: it submits, and it follows results."""
TOPOLOGY = load_topology().model_copy(update={"tenant_partitions": PARTITIONS})


@dataclass(frozen=True)
class Trusted:
    """A deployment on a secured Kafka, with the login of each role."""

    kafka: SecuredKafka
    deployment: str

    def of(self, role: str) -> Settings:
        """The settings of a process that plays ``role``."""
        return self.kafka.login(role if role in (ADMIN, SDK) else f"{self.deployment}-{role}")

    def cli(self, *arguments: str) -> tuple[int, Any]:
        """Run a command as the administrator."""
        ended = subprocess.run(
            [sys.executable, "-m", "settler_streams.cli.main", *arguments, "--json"],
            env={**os.environ, **self.of(ADMIN).environment()}, capture_output=True, timeout=100, check=False,
        )  # fmt: skip
        assert b"Traceback" not in ended.stderr, ended.stderr.decode()
        return ended.returncode, json.loads(ended.stdout or b"null")


@pytest.fixture(scope="module")
def trusted(
    services: Services, postgres: Service, deployment: str, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trusted]:
    folder = tmp_path_factory.mktemp("data")
    settings = services.settings.model_copy(
        update={
            "deployment": deployment, "db_name": database.rpartition("/")[2], "data_dir": folder, "executor_slots": 2,
            "redis_host": "localhost",
        }
    )  # fmt: skip
    users = [f"{deployment}-{role}" for role in acls.roles_of(TOPOLOGY)]
    with secured_kafka(settings, [*users, SDK]) as kafka:
        yield Trusted(kafka, deployment)


SHARED = ("--as", f"producer=User:{SDK}", "--as", f"consumer=User:{SDK}")


@pytest.fixture(scope="module")
def granted(trusted: Trusted) -> list[dict[str, str]]:
    """The rules of the topology, as the command has put them in force."""
    assert trusted.cli("topology", "acls", "--check", *SHARED)[0] == 3
    code, created = trusted.cli("topology", "acls", "--apply", *SHARED)
    assert code == 0
    assert trusted.cli("topology", "acls", "--check", *SHARED) == (0, [])
    assert trusted.cli("topology", "acls", "--apply", *SHARED) == (0, [])
    return created


@pytest_asyncio.fixture(scope="module")
async def log(trusted: Trusted, granted: object) -> AsyncIterator[KafkaLog]:
    """Every agent at work, each with the login of its role."""
    admin = trusted.of(ADMIN)
    log = KafkaLog(admin, TOPOLOGY)
    await migrate(admin)
    await log.create()
    pool = await TenantConnectionPool.open(admin)
    try:
        async with running([new_app(role, trusted.of(role), TOPOLOGY, pool) for role in ROLES]):
            yield log
    finally:
        await pool.close()


def test_the_rules_are_those_of_the_topology(trusted: Trusted, granted: list[dict[str, str]]) -> None:
    may = {(rule["principal"], rule["operation"], rule["name"]) for rule in granted if rule["resource"] == "TOPIC"}
    prefix = trusted.deployment
    for topic in TOPOLOGY.topics:
        for role in topic.writers:
            who = f"User:{SDK}" if role in ("producer", "consumer") else f"User:{prefix}-{role}"
            assert (who, "WRITE", f"{prefix}.{topic.name}") in may
        for role in topic.readers:
            who = f"User:{SDK}" if role in ("producer", "consumer") else f"User:{prefix}-{role}"
            operator = role == "operator"
            assert (who, "READ", f"{prefix}." if operator else f"{prefix}.{topic.name}") in may
    writers = {who for who, operation, name in may if operation == "WRITE" and name == f"{prefix}.job-decisions"}
    assert writers == {f"User:{prefix}-admission", f"User:{prefix}-noisy-neighbour", f"User:{prefix}-operator"}


async def test_a_job_runs_with_a_login_for_each_role(trusted: Trusted, log: KafkaLog) -> None:
    tenant = TenantId(tenant_in(0, 0, PARTITIONS))
    await register(log, tenant, 0)
    records = InlineRecords(rows=(ROW,))
    transport = KafkaTransport(trusted.of(SDK), topology=TOPOLOGY)
    async with (
        executor_inside(trusted.of("executor"), KafkaLog(trusted.of(ADMIN), TOPOLOGY), "trusted"),
        SettlerClient(transport, tenant) as client,
    ):
        job = await client.submit(left=records, right=records)
        result = await job.result(timeout_s=60)
    assert (str(result.status), result.matches) == ("succeeded", 1)
    ends = {record.partition: record.offset + 1 for record in await log.read("job-results")}
    pool = await TenantConnectionPool.open(trusted.of(ADMIN))
    try:
        await log.until_recorded(pool, "recorder", "job-results", ends)
    finally:
        await pool.close()


async def test_what_lies_in_a_wrong_partition_is_forwarded_and_the_undecodable_set_aside(
    trusted: Trusted, log: KafkaLog
) -> None:
    stranger = tenant_in(1, 7, PARTITIONS)
    producer = KafkaLog(trusted.of(SDK), TOPOLOGY)
    await producer.append("usage-events", 0, [(stranger.encode(), b"forwarded")])
    letters = await log.until("dead-letters", lambda records: any(r.value == b"forwarded" for r in records))
    origins = {dict(r.headers)["dl-partition"] for r in letters if r.value == b"forwarded"}
    assert origins == {b"1"}


async def test_an_operator_redrives_and_takes_dead_letters_out(trusted: Trusted, log: KafkaLog) -> None:
    stranger = TenantId(tenant_in(1, 8, PARTITIONS))
    await KafkaLog(trusted.of(SDK), TOPOLOGY).append("job-requests", 1, [(stranger.encode(), b"refused")])
    await log.until("dead-letters", lambda records: any(r.value == b"refused" for r in records))
    operator, chosen = trusted.of("operator"), Selection(tenant=stranger)
    redriven = await dead_letters.redrive(operator, TOPOLOGY, chosen, limit=10, rate_per_s=10)
    assert len(redriven.sent) == 1
    assert await dead_letter_removal.take_out(operator, TOPOLOGY, stranger) >= 1


async def test_a_login_may_do_nothing_beyond_its_role(trusted: Trusted, log: KafkaLog) -> None:
    outsider = KafkaLog(trusted.of(SDK), TOPOLOGY)
    for topic in ("job-decisions", "job-results", "tenant-changes", "admission-changelog"):
        with pytest.raises(TopicAuthorizationFailedError):
            await outsider.append(topic, 0, [(b"key", b"value")])
    async with Cluster.of(trusted.of(SDK)).admin() as client:
        visible = {name.removeprefix(f"{trusted.deployment}.") for name in await client.list_topics()}
    assert visible == {"job-requests", "usage-events", "flag-commands", "job-decisions", "job-results"}
    async with outsider.consumer(group_id=f"{trusted.deployment}.admission") as consumer:
        consumer.assign([TopicPartition(outsider.full("job-results"), 0)])
        with pytest.raises(GroupAuthorizationFailedError):
            await consumer.committed(TopicPartition(outsider.full("job-results"), 0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kafka_sasl_password": SecretStr("not this one")},
        {"kafka_ssl_ca_file": None},
        {
            "kafka_security_protocol": "PLAINTEXT", "kafka_sasl_username": None, "kafka_sasl_password": None,
            "kafka_ssl_ca_file": None,
        },
    ],
    ids=["password", "authority", "plaintext"],
)  # fmt: skip
async def test_a_client_without_the_right_credentials_does_not_get_in(trusted: Trusted, wrong: dict[str, Any]) -> None:
    settings = trusted.of(SDK).model_copy(update=wrong)
    with pytest.raises(UnavailableError):
        async with Cluster.of(settings).admin() as client:
            await client.list_topics()
