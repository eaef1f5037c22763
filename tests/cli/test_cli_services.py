"""Commands against a real broker and a real database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.services.interface import Services

pytestmark = pytest.mark.services

Cli = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def cli(services: Services, kafka: object, postgres: object, database: str, deployment: str) -> Cli:
    settings = services.settings.model_copy(
        update={"deployment": deployment, "db_name": database.rpartition("/")[2], "redis_host": "localhost"}
    )

    def run(*arguments: str) -> tuple[int, Any]:
        ended = subprocess.run(
            [sys.executable, "-m", "settler_streams.cli.main", *arguments, "--json"],
            env={**os.environ, **settings.environment()}, capture_output=True, timeout=100, check=False,
        )  # fmt: skip
        assert b"Traceback" not in ended.stderr, ended.stderr.decode()
        return ended.returncode, json.loads(ended.stdout or b"null")

    return run


def test_the_topology_is_planned_applied_and_checked(cli: Cli) -> None:
    code, plan = cli("topology", "plan")
    assert code == 3
    assert {difference["what"] for difference in plan} == {"topic"}
    assert cli("topology", "check") == (3, {"agrees": False, "differences": len(plan)})
    code, done = cli("topology", "apply")
    assert (code, done) == (0, plan)
    assert cli("topology", "plan") == (0, [])
    assert cli("topology", "check") == (0, {"agrees": True, "differences": 0})


def test_migrations_are_applied_once(cli: Cli) -> None:
    code, first = cli("migrate")
    assert code == 0
    assert first["applied"][0].startswith("0001_")
    assert cli("migrate") == (0, {"applied": []})


def test_dead_letters_are_listed_and_a_missing_one_is_refused(cli: Cli) -> None:
    cli("topology", "apply")
    assert cli("dlq", "list") == (0, [])
    assert cli("dlq", "show", "0-0") == (4, None)
    assert cli("dlq", "redrive", "--all") == (0, {"sent": [], "quarantined": [], "already_redriven": []})
    assert cli("dlq", "redrive", "0-7")[0] == 4
