"""``settler up`` and what follows it: reuse, crashes, restarts, the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from settler_streams.dev.system import LocalSystem

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(300)]

WAIT_S = 90.0


class Local:
    """The command line with one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        given_elsewhere = ("DB_HOST", "REDIS_HOST", "KAFKA_BOOTSTRAP_SERVERS")
        self.environ = {name: value for name, value in os.environ.items() if name not in given_elsewhere}
        self.environ["SETTLER_STATE_DIR"] = str(state_dir)
        self.environ["SETTLER_DATA_DIR"] = str(state_dir.with_name("data"))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "settler_streams.cli.main", *arguments]
        return subprocess.Popen(
            command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )

    def run(self, *arguments: str) -> tuple[int, Any]:
        process = self.start(*arguments, "--json")
        out, err = process.communicate(timeout=WAIT_S)
        assert "Traceback" not in err, err
        return process.returncode, json.loads(out or "null")

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """`settler up` in the foreground, from its ready line on."""
        with self.start("up", *arguments) as process:
            try:
                assert process.stderr is not None
                assert process.stderr.readline() == "up; Ctrl-C stops everything\n", process.stderr.read()
                yield process
            finally:
                process.kill()

    def pids(self) -> dict[str, int]:
        found = LocalSystem(self.state_dir, environ=self.environ).status()
        parts = [*found.services, *found.processes]
        return {part.name: part.pid for part in parts if part.pid is not None}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path / "state")
    try:
        yield local
    finally:
        system = LocalSystem(local.state_dir, environ=local.environ)
        system.down()
        system.stack.destroy()


def until_answered(url: str) -> None:
    """Ask until the answer is 200: a machine that has just started all of this may be slow for a probe's patience."""
    end_s = time.monotonic() + WAIT_S
    while (status := httpx.get(url, timeout=WAIT_S).status_code) != 200:
        assert (status, time.monotonic() < end_s) == (503, True), url


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_up_is_reused_survives_a_crash_restarts_what_ends_and_stops_at_ctrl_c(local: Local) -> None:
    with local.up() as first:
        running = local.pids()
        assert set(running) == {"kafka", "postgres", "valkey", "worker-1", "executor-1", "courier", "gateway"}
        code, status = local.run("status")
        assert (code, status["running"]) == (0, True)
        for url in (f"{status['gateway_url']}/readyz", status["metrics_url"], *status["metrics_urls"].values()):
            until_answered(url)
        assert local.run("topology", "check") == (0, {"agrees": True, "differences": 0})
        assert local.run("migrate") == (0, {"applied": [], "undone": []})
        assert local.run("dlq", "list") == (0, [])
        code, _ = local.run("up", "--detach")
        assert code == 0
        assert local.pids() == running
        first.send_signal(signal.SIGKILL)
        first.wait(WAIT_S)
    assert local.pids() == running  # a crash of the parent leaves what the next start reuses

    with local.up() as second:
        assert local.pids() == running
        children = [child.pid for child in psutil.Process(running["executor-1"]).children(recursive=True)]
        assert children
        os.kill(running["executor-1"], signal.SIGKILL)
        assert second.stderr is not None
        assert second.stderr.readline().startswith("executor-1 ended and was started again")
        assert local.pids()["executor-1"] != running["executor-1"]
        assert not [pid for pid in children if lives(pid)]
        everything = {*running.values(), *local.pids().values()}
        second.send_signal(signal.SIGINT)
        assert second.wait(WAIT_S) == 0
    assert not [pid for pid in everything if lives(pid)]
    assert local.run("status")[0] == 3


def test_down_ends_an_up_that_runs_elsewhere(local: Local) -> None:
    with local.up("--executors", "0", "--workers", "0", "--no-courier") as up:
        running = local.pids()
        assert set(running) == {"kafka", "postgres", "valkey", "gateway"}
        code, status = local.run("down")
        assert (code, status["running"]) == (0, False)
        assert up.wait(WAIT_S) == 0
    assert not [pid for pid in running.values() if lives(pid)]


def test_down_can_delete_the_data(local: Local) -> None:
    with local.up("--executors", "0", "--workers", "0", "--no-courier") as up:
        stack = LocalSystem(local.state_dir, environ=local.environ).stack
        stack.status()
        homes = [local.state_dir, *(part.home for part in stack._parts.values())]
        assert [home for home in homes if not home.exists()] == []
        code, status = local.run("down", "--delete")
        assert (code, status["running"]) == (0, False)
        assert up.wait(WAIT_S) == 0
    assert [home for home in homes if home.exists()] == []
    assert local.run("down", "--delete")[0] == 0, "again, with nothing there"


def test_the_number_of_processes_follows_what_is_asked_for(local: Local) -> None:
    system = LocalSystem(local.state_dir, environ=local.environ)
    system.up(executors=2, workers=0, gateway=False)
    assert [one.name for one in system.status().processes] == ["executor-1", "executor-2"]
    kept = local.pids()["executor-1"]
    assert LocalSystem(local.state_dir, environ=local.environ).up(executors=1, workers=0, gateway=False)
    assert [one.name for one in system.status().processes] == ["executor-1"]
    assert local.pids()["executor-1"] == kept
