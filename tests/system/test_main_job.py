"""The main job on a whole system: our own processes on real services, as `make demo` and the README have them."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from settler_streams.cli.main import COMMANDS
from settler_streams.dev.demo.run import run_demo
from settler_streams.dev.demo.scenario import LOADS
from settler_streams.dev.system import LocalSystem
from settler_streams.published import ROOT
from settler_streams.settings import Settings

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(300)]

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_S_MAX = 60.0


@pytest.fixture(scope="module")
def environ(services, kafka, postgres, valkey, deployment, database, tmp_path_factory) -> dict[str, str]:
    """The environment of every process of the system: the session's services, a deployment of its own."""
    settings: Settings = services.settings.model_copy(
        update={
            "deployment": deployment,
            "db_name": database.rpartition("/")[2],
            "data_dir": tmp_path_factory.mktemp("data"),
        }
    )
    return {**os.environ, **settings.environment()}


@pytest.fixture(scope="module")
def settings(environ, tmp_path_factory) -> Iterator[Settings]:
    """Settings of a system that is up."""
    system = LocalSystem(tmp_path_factory.mktemp("system") / "state", environ=environ)
    try:
        yield system.up()
    finally:
        system.down()


async def test_the_demo_holds(settings):
    console = Console(file=io.StringIO(), width=160)
    outcome = await run_demo(settings, console)
    said = console.file.getvalue()
    assert outcome.problems == [], said
    by_name = {tally.load.name: tally for tally in outcome.tallies}
    assert set(by_name) == {load.name for load in LOADS}
    for tally in outcome.tallies:
        assert tally.submitted == tally.load.jobs + tally.load.preview_jobs
        assert tally.submitted == tally.admitted + sum(tally.rejected.values())
        assert tally.finished == tally.admitted == len(tally.latencies_s)
        assert {str(result.status) for result in tally.results} == {"succeeded"}
        assert tally.load.name in said
    assert by_name["Dune Studio"].rejected["flag_disabled"] == 1
    assert by_name["Acme Holding"].rejected.total() == 0
    assert by_name["Cedar Logistics"].rejected.total() > 0
    assert by_name["Elm Street Books"].rejected.total() > 0
    assert {noise.tenant for noise in outcome.noise} == {by_name["Cedar Logistics"].tenant}


async def test_the_producer_and_the_consumer_of_the_readme_work_when_pasted(settings, environ, tmp_path):
    created = _settler(
        environ, "tenants", "create", "--name", "Acme", "--slug", "acme", "--tier", "growth",
        "--owner-email", "me@acme.example", "--owner-password", "change-me-soon",
    )  # fmt: skip
    tenant = created.strip()
    for name in ("producer.py", "consumer.py"):
        (tmp_path / name).write_text(_snippet(name), encoding="utf-8")
        assert len(_snippet(name).splitlines()) <= 24
    said = await asyncio.to_thread(_run, [sys.executable, "producer.py", tenant], environ, tmp_path)
    assert said == "succeeded: 2 matches, 1 unmatched\n"
    consumer = await asyncio.create_subprocess_exec(
        sys.executable, "-u", "consumer.py", tenant, cwd=tmp_path, env=environ, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(COMMAND_S_MAX):
            line = (await consumer.stdout.readline()).decode()
    finally:
        consumer.kill()
        await consumer.wait()
    assert re.fullmatch(r"[0-9a-f-]{36} succeeded 2 matches\n", line)


def test_the_readme_names_only_commands_that_exist():
    named = set(re.findall(r"`settler ([a-z]+)", README)) | set(re.findall(r"\(settler ([a-z]+)", README))
    assert named
    assert named <= set(COMMANDS)


def test_the_readme_links_to_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def _settler(environ: Mapping[str, str], *arguments: str) -> str:
    return _run([sys.executable, "-m", "settler_streams.cli.main", *arguments], environ)


def _run(command: Sequence[str], environ: Mapping[str, str], cwd: Path | None = None) -> str:
    ended = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def _snippet(name: str) -> str:
    found = re.search(rf"<!-- {re.escape(name)} -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert found, name
    return found[1]
