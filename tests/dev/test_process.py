"""A supervised child is found again by pid and start time, is not mistaken, and always ends."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from settler_streams.dev.stack import ports
from settler_streams.dev.stack.process import ChildProcess, ProcessRef, end_all, processes_of
from settler_streams.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WAIT_S = 20.0

SERVE = "import signal; print('ready', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\nwhile 1: signal.pause()"
)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], ChildProcess]]:
    made: list[ChildProcess] = []

    def make(code: str) -> ChildProcess:
        command = [sys.executable, "-c", code]
        made.append(ChildProcess("child", command, log=tmp_path / "child.log", cwd=tmp_path))
        return made[-1]

    yield make
    for process in made:
        process.kill()


def test_ends_in_order_and_says_so(child: Callable[[str], ChildProcess]) -> None:
    process = child(SERVE)
    process.start()
    process.wait_for_line("ready", deadline_s=WAIT_S)
    assert process.running
    assert process.stop(deadline_s=WAIT_S) is True
    assert not process.running


def test_one_that_ignores_sigterm_is_killed_at_the_deadline(child: Callable[[str], ChildProcess]) -> None:
    process = child(STUBBORN)
    process.start()
    process.wait_for_line("ready", deadline_s=WAIT_S)
    assert process.stop(deadline_s=0.2) is False
    assert not process.running


def test_starting_twice_keeps_the_one_that_runs(child: Callable[[str], ChildProcess]) -> None:
    process = child(SERVE)
    assert process.start() == process.start()


def test_an_early_end_is_reported_with_the_end_of_the_log(child: Callable[[str], ChildProcess]) -> None:
    process = child("raise SystemExit('no such luck')")
    process.start()
    with pytest.raises(UnavailableError, match="no such luck"):
        process.wait_for_line("ready", deadline_s=WAIT_S)


def test_a_missed_deadline_is_reported(child: Callable[[str], ChildProcess]) -> None:
    process = child(SERVE)
    process.start()
    with pytest.raises(UnavailableError, match="not ready after"):
        process.wait_for_port(ports.free_port(), deadline_s=0.2)


def test_a_program_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    process = ChildProcess("ghost", [str(tmp_path / "ghost")], log=tmp_path / "log", cwd=tmp_path)
    with pytest.raises(UnavailableError, match="ghost cannot be started"):
        process.start()


def test_the_log_of_the_run_before_is_kept(child: Callable[[str], ChildProcess], tmp_path: Path) -> None:
    for word in ("first", "second"):
        process = child(f"print('{word}')")
        process.start()
        while process.running:
            os.sched_yield()
    assert (tmp_path / "child.log").read_text() == "second\n"
    assert (tmp_path / "child.log.previous").read_text() == "first\n"
    assert (tmp_path / "child.log").stat().st_mode & 0o777 == 0o600


def test_another_object_adopts_it_and_can_stop_it(child: Callable[[str], ChildProcess]) -> None:
    first, second = child(SERVE), child("")
    assert second.adopt(first.start())
    first.wait_for_line("ready", deadline_s=WAIT_S)
    assert second.stop(deadline_s=WAIT_S)
    assert not first.running


def test_a_reused_pid_is_not_mistaken() -> None:
    mine = psutil.Process()
    assert ProcessRef(mine.pid, mine.create_time()).find() == mine
    assert ProcessRef(mine.pid, mine.create_time() - 60).find() is None


def test_it_leads_its_own_session_so_a_ctrl_c_does_not_reach_it(child: Callable[[str], ChildProcess]) -> None:
    ref = child(SERVE).start()
    assert os.getsid(ref.pid) == ref.pid
    assert os.getsid(ref.pid) != os.getsid(0)


def test_leftovers_are_found_by_program_and_folder_alone(child: Callable[[str], ChildProcess], tmp_path: Path) -> None:
    process = child(STUBBORN)
    ref = process.start()
    process.wait_for_line("ready", deadline_s=WAIT_S)
    program = tmp_path.__class__(sys.executable)
    (tmp_path / "elsewhere").mkdir()
    assert processes_of(program, tmp_path / "elsewhere") == []
    found = processes_of(program, tmp_path)
    assert [leftover.pid for leftover in found] == [ref.pid]
    end_all(found, deadline_s=0.2)
    assert not process.running


def test_a_signal_to_one_that_has_ended_is_harmless(child: Callable[[str], ChildProcess]) -> None:
    process = child(SERVE)
    process.start()
    process.kill()
    process.send(signal.SIGTERM)
    assert process.stop(deadline_s=1) is True
