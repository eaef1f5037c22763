"""A worker that cannot start ends, and says why, though something that it has started refuses to end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from settler_streams.workers.run import EXIT_ERROR

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio
from settler_streams.cli import processes
from settler_streams.errors import UnavailableError
from settler_streams.runtime.app import FoldApp
from settler_streams.workers import run

run.EXIT_DEADLINE_S = 1.0
kept = []

async def refuse_to_end():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def start(app):
    kept.append(asyncio.create_task(refuse_to_end()))
    raise {raised}

FoldApp.start = start
processes.worker(["--roles", "admission"])
"""
SETTINGS = {"DB_HOST": "nowhere", "REDIS_HOST": "nowhere", "KAFKA_BOOTSTRAP_SERVERS": "nowhere:1"}


@pytest.mark.parametrize(
    ("raised", "exit_code", "said"),
    [
        ("UnavailableError('no broker answers')", 75, "no broker answers"),
        ("LookupError('a bug')", EXIT_ERROR, "LookupError: a bug"),
    ],
    ids=["unavailable", "unexpected"],
)
def test_a_worker_that_cannot_start_ends_and_says_why(raised: str, exit_code: int, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(raised=raised)], capture_output=True, text=True, timeout=90, check=False,
        env={**SETTINGS, "SETTLER_METRICS_PORT": "0"},
    )  # fmt: skip
    assert ended.returncode == exit_code
    assert said in ended.stdout + ended.stderr
