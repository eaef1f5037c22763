"""The stack keeps its secrets, drops root, and changes no permission that is not its own."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import psutil
import pytest

from tests.dev.observe import pids, stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from settler_streams.dev.stack import EmbeddedStack

pytestmark = pytest.mark.services


def test_secrets_are_private(make: Callable[..., EmbeddedStack]) -> None:
    old = os.umask(0o000)
    try:
        stack = make()
        stack.up({"postgres", "valkey"})
    finally:
        os.umask(old)
    private = [stack.state_dir / "state.json", stack.state_dir / "valkey" / "valkey.conf"]
    private += [part.log for part in stack.status() if part.log is not None]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert (stack.part("postgres").home / "data").stat().st_mode & 0o777 == 0o700
    assert (stack.state_dir / "valkey").stat().st_mode & 0o777 == 0o700
    assert len(set(stored(stack).secrets.values())) == 4
    hba = (stack.part("postgres").home / "data" / "pg_hba.conf").read_text()
    methods = {line.split()[-1] for line in hba.splitlines() if line.strip() and not line.startswith("#")}
    assert methods == {"scram-sha-256"}


def test_no_permission_of_another_folder_changes(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    wheel = Path(asyncpg.__file__).parents[1]
    watched = {
        *stack.state_dir.parents,
        *wheel.parents,
        wheel,
        Path.home(),
        Path("/var"),
        Path("/var/lib"),
        Path(tempfile.gettempdir()),
    }
    before = {path: _permissions(path) for path in watched}
    stack.up({"postgres", "valkey"})
    stack.down()
    assert {path: _permissions(path) for path in watched} == before


def _permissions(path: Path) -> tuple[int, int, int] | None:
    return (path.stat().st_mode, path.stat().st_uid, path.stat().st_gid) if path.exists() else None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_started_by_root_postgres_runs_as_nobody_where_nobody_can_reach(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    stack.up({"postgres"})
    nobody = pwd.getpwnam("nobody").pw_uid
    process = psutil.Process(pids(stack)["postgres"])
    assert process.uids() == (nobody, nobody, nobody)
    assert process.gids() == (pwd.getpwnam("nobody").pw_gid,) * 3
    status = Path(f"/proc/{process.pid}/status")
    if status.exists():  # Linux
        assert "Groups:\t \n" in status.read_text()  # none of root's
    home = stack.part("postgres").home
    assert (home / "data").stat().st_uid == nobody
    assert home.stat().st_uid == 0  # what nobody owns, every other service running as nobody could change
    assert all(folder.stat().st_mode & 0o001 for folder in home.parents)
    binaries = Path(process.exe()).parents[3]
    assert not [p for p in binaries.rglob("*") if not p.is_symlink() and (p.stat().st_uid or p.stat().st_mode & 0o022)]
