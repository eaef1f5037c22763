"""The environment is read once; every mistake in it is named, and no secret is."""

from __future__ import annotations

import ssl
from urllib.parse import unquote, urlsplit

import pytest
import trustme
from redis.connection import parse_url

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import ConfigurationError
from settler_streams.settings import Settings

LOGIN = {
    "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "KAFKA_SASL_USERNAME": "settler-admission",
    "KAFKA_SASL_PASSWORD": "a-secret",
}


def test_what_is_read_is_what_a_child_process_reads() -> None:
    given = {**LOGIN, "DB_HOST": "db", "DB_PORT": "5433", "KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2"}
    settings = Settings.from_environment(given)
    assert Settings.from_environment(settings.environment()) == settings
    assert given.items() <= settings.environment().items()


@pytest.mark.parametrize("host", ["valkey", "::1"])
def test_a_password_of_whatever_characters_is_the_same_in_a_url(host: str) -> None:
    password = "a/b#c?d%23@:[ü"
    given = {"REDIS_PASSWORD": password, "REDIS_HOST": host, "DB_PASSWORD": password, "DB_HOST": host, "DB_NAME": "a/b"}
    settings = Settings.from_environment(given)
    redis = parse_url(settings.redis_url())
    assert (redis["host"], redis["port"], redis["password"]) == (host, 6379, password)
    postgres = urlsplit(settings.postgres_url(owner=True))
    assert (postgres.hostname, postgres.port, unquote(postgres.password or "")) == (host, 5432, password)
    assert unquote(postgres.path) == "/a/b"


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment({"DB_PORT": "0", "KAFKA_BOOTSTRAP_SERVERS": "nowhere", "SETTLER_DEPLOYMENT": "A B"})
    for name in ("DB_PORT", "KAFKA_BOOTSTRAP_SERVERS", "SETTLER_DEPLOYMENT"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"KAFKA_SASL_PASSWORD": ""}, "KAFKA_SASL_PASSWORD"),
        ({"KAFKA_SASL_USERNAME": ""}, "KAFKA_SASL_USERNAME"),
        ({"KAFKA_SECURITY_PROTOCOL": ""}, "KAFKA_SASL_USERNAME"),
        ({"KAFKA_SECURITY_PROTOCOL": "TLS"}, "KAFKA_SECURITY_PROTOCOL"),
        ({"KAFKA_SASL_MECHANISM": "GSSAPI"}, "KAFKA_SASL_MECHANISM"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SSL_CA_FILE": "/ca.pem"}, "KAFKA_SSL_"),
        ({"KAFKA_SSL_KEY_FILE": "/key.pem"}, "KAFKA_SSL_CERT_FILE"),
    ],
)
def test_half_of_a_security_configuration_is_refused(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment({**LOGIN, **changes})
    assert named in str(caught.value)
    assert "a-secret" not in str(caught.value)


def test_a_login_and_a_certificate_reach_every_client(tmp_path) -> None:
    authority, mine = trustme.CA(), tmp_path / "mine.pem"
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("settler-admission").private_key_and_cert_chain_pem.write_to_path(mine)
    files = {"KAFKA_SSL_CA_FILE": str(tmp_path / "ca.pem"), "KAFKA_SSL_CERT_FILE": str(mine)}
    access = Cluster.of(Settings.from_environment({**LOGIN, **files})).access
    context = access.pop("ssl_context")
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert len(context.get_ca_certs()) == 1
    assert access == {
        "security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "settler-admission", "sasl_plain_password": "a-secret",
    }  # fmt: skip


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_file_that_is_no_certificate_is_refused_by_its_name(tmp_path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match="KAFKA_SSL_CA_FILE"):
        Cluster.of(Settings.from_environment({**LOGIN, "KAFKA_SSL_CA_FILE": str(path)}))
