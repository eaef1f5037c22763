"""The services as containers, for a machine with a Docker engine."""

from __future__ import annotations

import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr
from testcontainers.core.container import DockerContainer

from settler_streams.dev.stack import ports, probes
from settler_streams.settings import Settings
from tests.services.interface import Service, Services

if TYPE_CHECKING:
    from collections.abc import Callable

KAFKA_IMAGE = "apache/kafka:4.2.2"
POSTGRES_IMAGE = "postgres:18"
VALKEY_IMAGE = "valkey/valkey:9"

READY_S_MAX = 180.0
"""The first start also pulls the image."""

POLL_S = 0.1


class ContainerService(Service):
    """A container whose host port is fixed, so that its address survives a restart."""

    def __init__(self, name: str, container: DockerContainer, answers: Callable[[], bool]) -> None:
        self.name = name  # type: ignore[misc]
        self._container = container
        self._answers = answers
        self._created = False

    def start(self) -> None:
        if not self._created:
            self._container.start()
            self._created = True
        elif not self.running:
            self._container.get_wrapped_container().start()
        end_s = time.monotonic() + READY_S_MAX
        while not self._answers():
            if time.monotonic() >= end_s:
                out, err = self._container.get_logs()
                raise TimeoutError(f"{self.name} not ready after {READY_S_MAX:g} s:\n{(out + err)[-4000:].decode()}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        if self.running:
            self._container.get_wrapped_container().stop()

    def kill(self) -> None:
        if self.running:
            self._container.get_wrapped_container().kill()

    def pause(self) -> None:
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        self._container.get_wrapped_container().unpause()

    @property
    def running(self) -> bool:
        if not self._created:
            return False
        self._container.reload()
        return bool(self._container.status in {"running", "paused"})

    def remove(self) -> None:
        """Delete the container and its volumes."""
        if self._created:
            self._container.stop()


class ContainerServices(Services):
    """One container each for Kafka, PostgreSQL and Valkey."""

    def __init__(self) -> None:
        kafka_port = ports.free_port()
        postgres_port = ports.free_port({kafka_port})
        valkey_port = ports.free_port({kafka_port, postgres_port})
        postgres_password, app_password, valkey_password = (secrets.token_urlsafe(24) for _ in range(3))
        kafka, postgres = _kafka(kafka_port), _postgres(postgres_port, postgres_password)
        valkey = _valkey(valkey_port, valkey_password)
        host = kafka.get_docker_client().host()
        self._data = tempfile.TemporaryDirectory(prefix="settler-test-")
        self.settings = Settings(
            db_host=host,
            db_port=postgres_port,
            db_user="postgres",
            db_password=SecretStr(postgres_password),
            db_app_password=SecretStr(app_password),
            redis_host=host,
            redis_port=valkey_port,
            redis_password=SecretStr(valkey_password),
            kafka_bootstrap_servers=f"{host}:{kafka_port}",
            data_dir=Path(self._data.name),
        )
        kafka.with_env("KAFKA_ADVERTISED_LISTENERS", f"CLIENT://{host}:{kafka_port}")
        self.kafka: ContainerService = ContainerService("kafka", kafka, lambda: probes.kafka_answers(host, kafka_port))
        self.postgres: ContainerService = ContainerService(
            "postgres",
            postgres,
            lambda: probes.postgres_answers(host, postgres_port, "postgres", postgres_password),
        )
        self.valkey: ContainerService = ContainerService(
            "valkey", valkey, lambda: probes.valkey_answers(host, valkey_port, valkey_password)
        )

    def close(self) -> None:
        try:
            for service in (self.kafka, self.postgres, self.valkey):
                service.remove()
        finally:
            self._data.cleanup()


def _kafka(port: int) -> DockerContainer:
    """A KRaft node like the embedded one; the address it advertises is set by the caller."""
    return (
        DockerContainer(KAFKA_IMAGE)
        .with_bind_ports(port, port)
        .with_env("KAFKA_NODE_ID", "1")
        .with_env("KAFKA_PROCESS_ROLES", "broker,controller")
        .with_env("KAFKA_LISTENERS", f"CLIENT://:{port},CONTROLLER://:9093")
        .with_env("KAFKA_LISTENER_SECURITY_PROTOCOL_MAP", "CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT")
        .with_env("KAFKA_CONTROLLER_LISTENER_NAMES", "CONTROLLER")
        .with_env("KAFKA_INTER_BROKER_LISTENER_NAME", "CLIENT")
        .with_env("KAFKA_CONTROLLER_QUORUM_VOTERS", "1@localhost:9093")
        .with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
        .with_env("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0")
        .with_env("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS", "8")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS", "8")
        .with_env("KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR", "1")
    )


def _postgres(port: int, password: str) -> DockerContainer:
    container = DockerContainer(POSTGRES_IMAGE).with_bind_ports(5432, port).with_env("POSTGRES_PASSWORD", password)
    return container.with_env("POSTGRES_DB", "settler").with_command("postgres -c max_connections=200")


def _valkey(port: int, password: str) -> DockerContainer:
    command = f"valkey-server --requirepass {password} --save '' --maxmemory 256mb --maxmemory-policy noeviction"
    return DockerContainer(VALKEY_IMAGE).with_bind_ports(6379, port).with_command(command)
