"""Configuration: one frozen object, read once from the environment, with every mistake reported together.

The names are those of the specification (``DB_HOST`` … ``ENABLE_SCHEMA_PER_TENANT``) and ``KAFKA_BOOTSTRAP_SERVERS``;
what the specification does not name starts with ``SETTLER_``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import platformdirs
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from settler_streams.errors import ConfigurationError

Port = Annotated[int, Field(ge=1, le=65535)]
_WEBHOOK_KEY = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]{0,31}):(?P<key>[0-9a-fA-F]{64})")


def _env(name: str, default: Any, doc: str, **constraints: Any) -> Any:
    """A field read from the environment variable ``name``; also settable by its Python name."""
    return Field(default=default, validation_alias=AliasChoices(name), description=doc, **constraints)


class Settings(BaseModel):
    """Everything a process can be told from outside.

    Raises:
        ConfigurationError: by :meth:`from_environment`, naming each variable that is wrong and why.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="forbid")

    # Database
    db_host: str = _env("DB_HOST", "localhost", "PostgreSQL host, or the directory of its socket", min_length=1)
    db_port: Port = _env("DB_PORT", 5432, "PostgreSQL port")
    db_name: str = _env("DB_NAME", "settler", "database name", min_length=1)
    db_user: str = _env("DB_USER", "postgres", "role that owns the schema and migrates it", min_length=1)
    db_password: SecretStr = _env("DB_PASSWORD", SecretStr("postgres"), "password of DB_USER")
    db_app_user: str = _env(
        "DB_APP_USER", "settler_app", "role of the services; cannot bypass row-level security", min_length=1
    )
    db_app_password: SecretStr = _env("DB_APP_PASSWORD", SecretStr("settler_app"), "password of DB_APP_USER")
    db_read_host: str | None = _env("DB_READ_HOST", None, "host of a read replica; unset: reads go to DB_HOST")
    db_pool_size: int = _env("DB_POOL_SIZE", 8, "connections of one process", ge=1, le=200)
    db_pool_wait_ms: int = _env("DB_POOL_WAIT_MS", 5_000, "longest wait for a connection", ge=1, le=60_000)
    db_statement_cache_size: int = _env(
        "DB_STATEMENT_CACHE_SIZE", 200, "prepared statements per connection; 0 behind transaction-mode PgBouncer", ge=0
    )

    # Redis
    redis_host: str = _env("REDIS_HOST", "localhost", "Redis or Valkey host", min_length=1)
    redis_port: Port = _env("REDIS_PORT", 6379, "Redis or Valkey port")
    redis_password: SecretStr | None = _env("REDIS_PASSWORD", None, "Redis or Valkey password")
    redis_cluster: bool = _env("REDIS_CLUSTER", False, "REDIS_HOST is a node of a Redis or Valkey cluster")

    # Kafka
    kafka_bootstrap_servers: str = _env(
        "KAFKA_BOOTSTRAP_SERVERS",
        "localhost:9092",
        "host:port, comma-separated",
        pattern=r"^[^,\s]+:\d+(,[^,\s]+:\d+)*$",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = _env(
        "KAFKA_SECURITY_PROTOCOL", "PLAINTEXT", "PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = _env(
        "KAFKA_SASL_MECHANISM", "SCRAM-SHA-512", "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
    )
    kafka_sasl_username: str | None = _env("KAFKA_SASL_USERNAME", None, "who this process is to Kafka")
    kafka_sasl_password: SecretStr | None = _env("KAFKA_SASL_PASSWORD", None, "its password")
    kafka_ssl_ca_file: Path | None = _env(
        "KAFKA_SSL_CA_FILE", None, "PEM file of the authorities that sign brokers; unset: the system's"
    )
    kafka_ssl_cert_file: Path | None = _env(
        "KAFKA_SSL_CERT_FILE", None, "PEM file of this process's certificate, where brokers ask for one"
    )
    kafka_ssl_key_file: Path | None = _env(
        "KAFKA_SSL_KEY_FILE", None, "PEM file of its key; unset: the key is in KAFKA_SSL_CERT_FILE"
    )
    kafka_replication_factor: int = _env(
        "KAFKA_REPLICATION_FACTOR", 1, "replicas of each topic that is created; 3 in production", ge=1, le=9
    )
    deployment: str = _env(
        "SETTLER_DEPLOYMENT",
        "settler",
        "prefix of topics, consumer groups and transactional ids; several deployments can share a broker",
        pattern=r"^[a-z][a-z0-9-]{0,38}$",
    )

    # Observability
    otlp_endpoint: str | None = _env("OTLP_ENDPOINT", None, "OTLP/HTTP receiver, such as http://localhost:4318")
    service_name: str = _env("SERVICE_NAME", "settler-api", "service.name of traces and metrics", min_length=1)
    log_level: str = _env(
        "SETTLER_LOG_LEVEL", "info", "debug, info, warning or error", pattern="^(debug|info|warning|error)$"
    )

    # Multi-tenancy
    enable_schema_per_tenant: bool = _env(
        "ENABLE_SCHEMA_PER_TENANT", False, "a new tenant gets a PostgreSQL schema of its own"
    )
    tenant_delete_grace_days: int = _env(
        "TENANT_DELETE_GRACE_DAYS", 30, "how long a deleted tenant can be restored, in days", ge=0, le=3650
    )

    dns_nameservers: str | None = _env(
        "DNS_NAMESERVERS",
        None,
        "address:port, comma-separated, asked for the records of custom domains; unset: the system's",
        pattern=r"^(\[[0-9a-f:]+\]|[0-9.]+):\d+(,(\[[0-9a-f:]+\]|[0-9.]+):\d+)*$",
    )

    # Webhooks
    webhook_keys: SecretStr | None = _env(
        "SETTLER_WEBHOOK_KEYS",
        None,
        "keys of webhook secrets, as name:64 hexadecimal digits, comma-separated; the first encrypts, all decrypt; "
        "unset: there are no webhooks",
    )
    webhook_allow_http: bool = _env("SETTLER_WEBHOOK_ALLOW_HTTP", False, "whether webhooks may be sent without TLS")
    webhook_allow_private: bool = _env(
        "SETTLER_WEBHOOK_ALLOW_PRIVATE",
        False,
        "whether webhooks may go to private addresses; to loopback ones then without TLS too",
    )
    webhook_ca_file: Path | None = _env(
        "SETTLER_WEBHOOK_CA_FILE", None, "PEM file of the authorities that sign endpoints; unset: the system's"
    )
    webhooks_per_tenant: int = _env("SETTLER_WEBHOOKS_PER_TENANT", 10, "webhooks that a tenant may have", ge=1, le=1000)
    webhook_lanes: int = _env(
        "SETTLER_WEBHOOK_LANES",
        32,  # up to four bodies of a mebibyte at most each: 128 MiB if all of them were that large
        "webhooks that one courier serves at a time",
        ge=1,
        le=256,
    )
    webhook_timeout_s: int = _env(
        "SETTLER_WEBHOOK_TIMEOUT_S", 10, "how long an endpoint may take to answer, connecting included", ge=1, le=30
    )
    webhook_retry_s: int = _env(
        "SETTLER_WEBHOOK_RETRY_S", 86_400, "how long a delivery is tried before it is a dead letter", ge=1, le=604_800
    )

    # Processes
    gateway_host: str = _env("SETTLER_GATEWAY_HOST", "127.0.0.1", "address the gateway listens on", min_length=1)
    gateway_port: Port = _env("SETTLER_GATEWAY_PORT", 8080, "port the gateway listens on")
    metrics_port: int = _env("SETTLER_METRICS_PORT", 0, "port of a worker's /metrics; 0: a free one", ge=0, le=65535)
    executor_slots: int = _env("SETTLER_EXECUTOR_SLOTS", 4, "jobs one executor runs at once", ge=1, le=256)
    executor_memory_mib: int = _env(
        "SETTLER_EXECUTOR_MEMORY_MIB",
        4096,  # two sets of 1,000,000 rows, the most that are read, took 2.6 GiB on two cores
        "address space of one job's process (an executor has one per core)",
        ge=1024,
        le=1024 * 1024,
    )
    executor_job_s: int = _env(
        "SETTLER_EXECUTOR_JOB_S",
        300,  # the same sets took 6 s; many ambiguous rows, a slow disk and busy cores may take ten times that
        "longest time of one job in seconds; beyond it the attempt fails",
        ge=1,
        le=86_400,
    )
    data_dir: Path = _env(
        "SETTLER_DATA_DIR",
        Path(platformdirs.user_data_dir("settler-streams")),
        "holds data/<tenant id>/ with record sets, and the embedded services' state",
    )

    @model_validator(mode="after")
    def _check_kafka_access(self) -> Settings:
        """Half of a security configuration would fail at the first connection, or run without what was meant."""
        wants_sasl = self.kafka_security_protocol.startswith("SASL")
        wants_tls = self.kafka_security_protocol.endswith("SSL")
        has_user, has_password = self.kafka_sasl_username is not None, self.kafka_sasl_password is not None
        files = (self.kafka_ssl_ca_file, self.kafka_ssl_cert_file, self.kafka_ssl_key_file)
        protocol = f"KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol}"
        if wants_sasl and not (has_user and has_password):
            raise ValueError(f"{protocol} needs KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD")
        if not wants_sasl and (has_user or has_password):
            raise ValueError(f"{protocol} takes no KAFKA_SASL_USERNAME or KAFKA_SASL_PASSWORD")
        if not wants_tls and any(files):
            raise ValueError(f"{protocol} takes no KAFKA_SSL_* files")
        if self.kafka_ssl_key_file is not None and self.kafka_ssl_cert_file is None:
            raise ValueError("KAFKA_SSL_KEY_FILE needs KAFKA_SSL_CERT_FILE")
        return self

    @model_validator(mode="after")
    def _check_webhook_keys(self) -> Settings:
        self.webhook_keys_by_name()
        return self

    def webhook_keys_by_name(self) -> dict[str, bytes]:
        """The 256-bit keys by their names, the one that encrypts first. An error quotes none of them."""
        given = self.webhook_keys.get_secret_value() if self.webhook_keys is not None else ""
        keys: dict[str, bytes] = {}
        for entry in given.split(",") if given else ():
            match = _WEBHOOK_KEY.fullmatch(entry.strip())
            if match is None or match["name"] in keys:
                raise ValueError(
                    "SETTLER_WEBHOOK_KEYS: name:64 hexadecimal digits, comma-separated, each name (a-z, 0-9, -) once"
                )
            keys[match["name"]] = bytes.fromhex(match["key"])
        return keys

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check every setting once; an empty variable counts as unset."""
        source = os.environ if environ is None else environ
        given: dict[str, str] = {}
        for name in variable_names():
            if value := source.get(name, ""):
                given[name] = value
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = "; ".join(_problem(e) for e in error.errors())
            raise ConfigurationError(f"environment refused: {problems}") from error

    def environment(self) -> dict[str, str]:
        """The variables that make a child process see these same settings (secrets in clear text)."""
        values: dict[str, str] = {}
        for field, name in zip(type(self).model_fields, variable_names(), strict=True):
            value = getattr(self, field)
            if value is not None:
                values[name] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        return values

    def postgres_url(self, *, owner: bool = False) -> str:
        """The connection URL of the application role, or of the owner."""
        user, password = (self.db_user, self.db_password) if owner else (self.db_app_user, self.db_app_password)
        names = [quote(name, safe="") for name in (user, password.get_secret_value(), self.db_name)]
        return f"postgresql://{names[0]}:{names[1]}@{_in_url(self.db_host)}:{self.db_port}/{names[2]}"

    def redis_url(self) -> str:
        """The connection URL of Redis or Valkey, with the password when there is one."""
        secret = f":{quote(self.redis_password.get_secret_value(), safe='')}@" if self.redis_password else ""
        return f"redis://{secret}{_in_url(self.redis_host)}:{self.redis_port}/0"

    @property
    def record_sets_dir(self) -> Path:
        """Where record-set files lie: ``<data_dir>/data/<tenant id>/``."""
        return self.data_dir / "data"


def _in_url(host: str) -> str:
    """An IPv6 address in brackets; a socket's directory encoded."""
    return f"[{host}]" if ":" in host else quote(host, safe="")


def _problem(error: Any) -> str:
    if not error["loc"]:  # of several variables together; the input would be all of them, secrets included
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{error['loc'][0]}: {error['msg']} (got {error['input']!r})"


def variable_names() -> list[str]:
    """The environment variables that are read, in the order of the fields."""
    names: list[str] = []
    for field in Settings.model_fields.values():
        alias = field.validation_alias
        names.append(str(alias.choices[0]) if isinstance(alias, AliasChoices) else str(alias))
    return names
