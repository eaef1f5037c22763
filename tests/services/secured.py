"""A Kafka that asks who is there: TLS and SCRAM for clients, and access control lists for everyone but the admin."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import SecretStr

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.dev.stack.kafka import Kafka
from settler_streams.dev.stack.part import HOST
from settler_streams.dev.stack.ports import free_port
from settler_streams.dev.stack.probes import apart
from settler_streams.errors import UnavailableError

if TYPE_CHECKING:
    from settler_streams.settings import Settings

ADMIN = "admin"

_SECURITY = """
listeners=CLIENT://{host}:{port},INTERNAL://{host}:{internal_port},CONTROLLER://{host}:{controller_port}
advertised.listeners=CLIENT://{host}:{port},INTERNAL://{host}:{internal_port}
listener.security.protocol.map=CLIENT:SASL_SSL,INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=INTERNAL
listener.name.client.sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.client.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.client.ssl.keystore.type=PEM
listener.name.client.ssl.keystore.location={keystore}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
# The node talks to itself on listeners that clients of this test do not use.
super.users=User:{admin};User:ANONYMOUS
"""


class SecuredKafka(Kafka):
    """One node with users. Everything that is not allowed is forbidden."""

    def __init__(self, home: Path, settings: Settings, users: Iterable[str]) -> None:
        port = free_port()
        controller_port = free_port({port})
        self._internal_port = free_port({port, controller_port})
        super().__init__(home, port, controller_port)
        self._passwords = {user: secrets.token_urlsafe(16) for user in (ADMIN, *users)}
        self._authority = trustme.CA()
        self._settings = settings

    def login(self, user: str) -> Settings:
        """The settings of a process that is ``user`` to this Kafka."""
        return self._settings.model_copy(
            update={
                "kafka_bootstrap_servers": f"{HOST}:{self.port}",
                "kafka_security_protocol": "SASL_SSL",
                "kafka_sasl_mechanism": "SCRAM-SHA-512",
                "kafka_sasl_username": user,
                "kafka_sasl_password": SecretStr(self._passwords[user]),
                "kafka_ssl_ca_file": self.home / "authority.pem",
            }
        )

    def prepare(self) -> None:
        self._authority.cert_pem.write_to_path(self.home / "authority.pem")
        issued = self._authority.issue_cert(HOST)
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        keystore = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        keystore += b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        (self.home / "keystore.pem").write_bytes(keystore)
        super().prepare()

    def properties(self, data: Path) -> bytes:
        security = _SECURITY.format(
            host=HOST, port=self.port, internal_port=self._internal_port, controller_port=self.controller_port,
            keystore=self.home / "keystore.pem", admin=ADMIN,
        )  # fmt: skip
        ours = {line.partition("=")[0] for line in security.splitlines()}
        kept = [line for line in super().properties(data).decode().splitlines() if line.partition("=")[0] not in ours]
        return ("\n".join(kept) + security).encode()

    def format_options(self) -> list[str]:
        return [
            option
            for user, password in self._passwords.items()
            for option in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={password}]")
        ]

    def answers(self) -> bool:
        async def asked() -> bool:
            try:
                async with Cluster.of(self.login(ADMIN)).admin() as client:
                    return bool((await client.describe_cluster())["brokers"])
            except UnavailableError:
                return False

        return apart(asked)


@contextmanager
def secured_kafka(settings: Settings, users: Iterable[str]) -> Iterator[SecuredKafka]:
    """Such a node, running; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="settler-secured-") as folder:
        kafka = SecuredKafka(Path(folder), settings, users)
        kafka.start()
        try:
            kafka.wait_ready()
            yield kafka
        finally:
            kafka.stop()
