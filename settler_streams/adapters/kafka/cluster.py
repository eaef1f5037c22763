"""The Kafka cluster as this process may reach it: its addresses, TLS, and who we are to it.

Every Kafka client of the system is made here, so none can forget the credentials.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError, KafkaError, NodeNotReadyError, RequestTimedOutError

from settler_streams.adapters.kafka import header_names
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.settings import Settings

header_names.install()

ADMIN_DEADLINE_S = 30.0
"""Longest wait for the broker in one administrative step; creating thirty topics takes about a second."""
NAMED_RETRY_S = 0.1
"""Between two looks for a broker in a cluster that names none."""
_NO_ANSWER = (KafkaConnectionError, NodeNotReadyError, RequestTimedOutError)
"""What aiokafka says of a connection that was lost, could not be made, or on which nothing came."""


@dataclass(frozen=True)
class Cluster:
    """Makes clients. Options given to a method are those of aiokafka's class.

    Args:
        servers: ``host:port``, comma-separated.
        access: aiokafka's options of the connection: protocol, TLS context, mechanism and credentials.
    """

    servers: str
    access: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings) -> Cluster:
        """The cluster of the settings.

        Raises:
            ConfigurationError: a certificate or key file cannot be read.
        """
        access: dict[str, Any] = {"security_protocol": settings.kafka_security_protocol}
        if settings.kafka_security_protocol.endswith("SSL"):
            access["ssl_context"] = _tls(settings)
        if settings.kafka_sasl_password is not None:
            access |= {
                "sasl_mechanism": settings.kafka_sasl_mechanism,
                "sasl_plain_username": settings.kafka_sasl_username,
                "sasl_plain_password": settings.kafka_sasl_password.get_secret_value(),
            }
        return cls(settings.kafka_bootstrap_servers, access)

    def producer(self, **options: Any) -> aiokafka.AIOKafkaProducer:
        """A producer, not started."""
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers=self.servers, **self.access, **options)
        _await_a_name(producer.client)
        return producer

    def consumer(self, *topics: str, **options: Any) -> aiokafka.AIOKafkaConsumer:
        """A consumer, not started."""
        consumer = aiokafka.AIOKafkaConsumer(*topics, bootstrap_servers=self.servers, **self.access, **options)
        _await_a_name(consumer._client)  # noqa: SLF001 - a producer shows its client, a consumer does not
        return consumer

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        """An administrative client, closed at the end.

        Raises:
            UnavailableError: the broker did not answer, at the start or what the client was used to ask.
        """
        try:
            async with asyncio.timeout(ADMIN_DEADLINE_S):
                client = await self._named()
        except (KafkaError, TimeoutError, OSError) as error:
            raise self._silent(error) from error
        try:
            yield client
        except _NO_ANSWER as error:
            raise self._silent(error) from error
        finally:
            await client.close()

    def _silent(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"Kafka at {self.servers} did not answer: {error!r}")

    async def _named(self) -> AIOKafkaAdminClient:
        """A started client whose cluster names a broker.

        A broker that its controller has not heard of for a while (a frozen machine) answers, but is named by nobody
        until the controller hears it again. A client that starts meanwhile knows no node to ask.
        """
        task = asyncio.current_task()
        cancelled = task.cancelling() if task is not None else 0
        while True:
            client = AIOKafkaAdminClient(
                bootstrap_servers=self.servers, request_timeout_ms=int(ADMIN_DEADLINE_S * 1000), **self.access
            )
            try:
                await client.start()
                await client.describe_cluster()
            except BaseException as error:
                await client.close()
                if not isinstance(error, NodeNotReadyError):
                    raise
                if task is not None and task.cancelling() > cancelled:
                    # aiokafka's close awaits a task that it has cancelled, and takes our own cancellation for that one.
                    raise asyncio.CancelledError from error
            else:
                return client
            await asyncio.sleep(NAMED_RETRY_S)


def heed_cancellation() -> None:
    """To be called after aiokafka has closed a client, where the task would go on for ever.

    aiokafka's close awaits a task that it has cancelled, and takes our own cancellation for that one.

    Raises:
        asyncio.CancelledError: this task was cancelled, and does not know yet.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _await_a_name(client: AIOKafkaClient) -> None:
    """Let ``client`` look again for a coordinator in a cluster that names no broker; see :meth:`Cluster._named`.

    aiokafka asserts there that it knows one. What it gets instead is an error after which it renews its metadata and
    repeats the look, within the deadlines of whoever waits for it.
    """
    look_up = client.coordinator_lookup

    async def patient(kind: int, name: str) -> int:
        if not client.cluster.brokers():
            raise NodeNotReadyError("the cluster names no broker at present")
        return int(await look_up(kind, name))

    client.coordinator_lookup = patient


def _tls(settings: Settings) -> ssl.SSLContext:
    """Checks the broker's certificate and name, by the system's authorities unless others are given; shows ours."""
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"KAFKA_SSL_CA_FILE={settings.kafka_ssl_ca_file}: {error}") from error
    if settings.kafka_ssl_cert_file is not None:
        try:
            context.load_cert_chain(settings.kafka_ssl_cert_file, settings.kafka_ssl_key_file)
        except (OSError, ssl.SSLError) as error:
            files = (
                f"KAFKA_SSL_CERT_FILE={settings.kafka_ssl_cert_file}, KAFKA_SSL_KEY_FILE={settings.kafka_ssl_key_file}"
            )
            raise ConfigurationError(f"{files}: {error}") from error
    return context
