"""The compose file starts what the system needs, with settings that the program knows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from settler_streams.cli.main import COMMANDS
from settler_streams.settings import Settings, variable_names

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "worker", "executor", "courier", "gateway")
SCRAPES = yaml.safe_load((ROOT / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]


def test_everything_is_there() -> None:
    assert set(SERVICES) == {
        "kafka", "postgres", "valkey", "migrate", "worker", "executor", "courier", "gateway", "prometheus", "grafana",
        "otel-collector",
    }  # fmt: skip
    assert SERVICES["kafka"]["image"] == "apache/kafka:4.2.2"
    assert SERVICES["postgres"]["image"] == "postgres:18"


@pytest.mark.parametrize("name", OURS)
def test_our_services_get_settings_that_exist_and_are_valid(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert set(environment) <= set(variable_names())
    filled = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for key, value in environment.items()}
    settings = Settings.from_environment(filled)
    assert settings.gateway_host == "0.0.0.0"  # noqa: S104 - within its container
    for host in (settings.db_host, settings.redis_host, settings.kafka_bootstrap_servers.partition(":")[0]):
        assert host in SERVICES


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_commands_that_exist(name: str) -> None:
    words = " ".join(SERVICES[name]["command"])
    commands = re.findall(r"settler (\w+)", words) if name == "migrate" else words.split()
    assert commands
    assert set(commands) <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - {"migrate", "otel-collector"}))
def test_every_service_that_stays_has_a_healthcheck(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]


def test_whatever_is_waited_for_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[needed], (name, needed)
            else:
                assert how["condition"] == "service_completed_successfully"
                assert needed == "migrate"


def test_secrets_come_from_the_environment_and_ports_are_local() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|AUTH|SECRET|TOKEN|KEYS", key):
                assert re.fullmatch(r"\$\{\w+:-[\w:]+\}", value), (name, key)
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), (name, port)


def test_every_mounted_file_and_volume_exists() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_file(), (name, source)
            else:
                assert source in COMPOSE["volumes"], (name, source)
        for config in service.get("configs", ()):
            assert config["source"] in COMPOSE["configs"]


def test_the_image_is_built_from_what_a_wheel_needs() -> None:
    recipe = SERVICES["worker"]["build"]["dockerfile_inline"]
    for copied in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists(), source
    assert "USER settler" in recipe


def test_prometheus_scrapes_our_services_where_they_listen() -> None:
    for scrape in SCRAPES:
        (discovery,) = scrape["dns_sd_configs"]
        (name,) = discovery["names"]
        assert scrape["job_name"] == f"settler-{name}"
        environment = SERVICES[name]["environment"]
        expected = 8080 if name == "gateway" else int(environment["SETTLER_METRICS_PORT"])
        assert discovery["port"] == expected


def test_traces_are_sent_to_where_they_are_received() -> None:
    receivers = yaml.safe_load((ROOT / "monitoring" / "otel-collector.yml").read_text())["receivers"]
    port = receivers["otlp"]["protocols"]["http"]["endpoint"].rpartition(":")[2]
    assert SERVICES["worker"]["environment"]["OTLP_ENDPOINT"] == f"http://otel-collector:{port}"


def compose_client() -> str | None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        return None
    return docker


@pytest.mark.skipif(compose_client() is None, reason="the docker compose client is not installed")
def test_docker_compose_reads_it() -> None:
    command = [str(compose_client()), "compose", "-f", str(ROOT / "docker-compose.yml"), "config", "-q"]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
