"""The processes of a round, each with a supervisor that starts it again, as an operator's process manager would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from settler_streams.dev.stack.process import ProcessRef
from settler_streams.dev.system import end_orphans
from settler_streams.published import ROOT
from tests.chaos.fail_points import Arm
from tests.chaos.pace import NotObservedError, elapse, observe

RESTART_MIN_S, RESTART_MAX_S = 0.2, 4.0
"""A process that ends again at once waits longer each time: its reason may be a service that is down."""
STEADY_S = 8.0
"""Who has run this long is not counted as one that ends again at once."""
AT_WORK_S = 3.0
"""Imports take a second and joining another."""
STOP_S_MAX = 45.0
"""An executor lets running attempts finish for twenty seconds, then leaves; a worker needs fifteen at most."""


@dataclass
class Member:
    """One process of the fleet. ``arms`` holds the fail points of its next runs, one for each start."""

    name: str
    command: list[str]
    environ: dict[str, str]
    arms: deque[Arm] = field(default_factory=deque)
    armed: Arm | None = None
    format_added: int = 0
    wanted: bool = True
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    began_s: float = 0.0
    codes: Counter[int] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.returncode is None


class Fleet:
    """Starts members, keeps them alive, signals them, stops them."""

    def __init__(self, folder: Path, environ: Mapping[str, str], *, session_s: float, mutant: str = "") -> None:
        self._folder = folder
        self.notes = folder / "fail-points.jsonl"
        self._environ = {
            **environ,
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "CHAOS_NOTES": str(self.notes),
            "CHAOS_SESSION_S": str(session_s),
            "CHAOS_MUTANT": mutant,
        }
        self.members: dict[str, Member] = {}
        self.holding = False
        """While it is set, members start without their fail points."""
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, name: str, command: list[str], environ: Mapping[str, str]) -> Member:
        """A member that runs from now on."""
        member = Member(name, command, {**self._environ, **environ, "CHAOS_NAME": name})
        self.members[name] = member
        self._tasks[name] = asyncio.create_task(self._supervise(member), name=name)
        return member

    def signal(self, name: str, signum: signal.Signals) -> bool:
        """Send a signal, if it runs."""
        process = self.members[name].process
        if process is None or process.returncode is not None:
            return False
        process.send_signal(signum)
        return True

    async def replace(self, name: str) -> None:
        """Stop in order; the supervisor starts it again."""
        process = self.members[name].process
        if self.signal(name, signal.SIGTERM) and process is not None:
            await _ended(process, name)

    def steady(self, name: str) -> bool:
        """Whether it has run for long enough to be at work, and is not stopped."""
        member = self.members[name]
        at_work = asyncio.get_running_loop().time() - member.began_s > AT_WORK_S
        return member.running and at_work and member.process is not None and not _is_stopped(member.process.pid)

    def frozen(self) -> list[int]:
        """Pids of members that a fail point has stopped."""
        return [m.process.pid for m in self.members.values() if m.process and m.running and _is_stopped(m.process.pid)]

    def noted(self) -> list[dict[str, object]]:
        """What the fail points have written."""
        if not self.notes.exists():
            return []
        whole, _, _ = self.notes.read_text().rpartition("\n")  # what is being written has no end yet
        return [json.loads(line) for line in whole.splitlines()]

    async def stop(self) -> dict[str, int]:
        """SIGTERM to all, in order; returns the exit code of each. One that outlasts its deadline is killed: -9."""
        for member in self.members.values():
            member.wanted = False
            member.changed.set()
        for member in self.members.values():
            self.signal(member.name, signal.SIGTERM)
        ended = await asyncio.gather(*(self._end(member) for member in self.members.values()))
        await asyncio.gather(*self._tasks.values())
        return dict(zip(self.members, ended, strict=True))

    async def _end(self, member: Member) -> int:
        if member.process is None:
            return 0
        with contextlib.suppress(NotObservedError):
            await _ended(member.process, member.name)
        return await member.process.wait()

    async def close(self) -> None:
        """Nothing is left running, whatever has happened."""
        for member in self.members.values():
            member.wanted = False
            member.changed.set()
            if member.process is not None and member.running:
                member.process.kill()
                await member.process.wait()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _supervise(self, member: Member) -> None:
        pause_s = RESTART_MIN_S
        loop = asyncio.get_running_loop()
        while member.wanted:
            began_s = member.began_s = loop.time()
            process = await self._start(member)
            former = _ref_of(process.pid)
            code = await process.wait()
            if former is not None:
                await asyncio.to_thread(end_orphans, former)
            member.codes[code] += 1
            self._rearm(member, process.pid)
            pause_s = RESTART_MIN_S if loop.time() - began_s > STEADY_S else min(2 * pause_s, RESTART_MAX_S)
            if member.wanted:
                await elapse(pause_s, member.changed)

    def _rearm(self, member: Member, pid: int) -> None:
        """A fail point that this run never reached, since it ended by something else, is for a later one."""
        arm, member.armed = member.armed, None
        if arm is not None and not any(note["pid"] == pid for note in self.noted()):
            member.arms.append(arm)

    async def _start(self, member: Member) -> asyncio.subprocess.Process:
        environ = dict(member.environ)
        member.armed = member.arms.popleft() if member.arms and not self.holding else None
        if member.armed is not None:
            environ["CHAOS_ARM"] = member.armed.text()
        if member.format_added:
            environ["CHAOS_FORMAT"] = str(member.format_added)
        member.starts += 1
        with (self._folder / f"{member.name}.log").open("ab") as log:
            log.write(f"--- start {member.starts} {environ.get('CHAOS_ARM', '')}\n".encode())
            log.flush()
            member.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.chaos.worker", *member.command,
                cwd=ROOT, env=environ, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return member.process


async def _ended(process: asyncio.subprocess.Process, name: str) -> None:
    """Wait for the end of a process that was told to; one that a fail point freezes on its way out is woken.

    Raises:
        NotObservedError: it has not ended after :data:`STOP_S_MAX`; it is killed.
    """

    async def ended() -> bool:
        if process.returncode is None and _is_stopped(process.pid):
            process.send_signal(signal.SIGCONT)
        return process.returncode is not None

    try:
        await observe(f"{name} ends after SIGTERM", ended, STOP_S_MAX)
    except NotObservedError:
        process.kill()
        raise


def _ref_of(pid: int) -> ProcessRef | None:
    try:
        return ProcessRef(pid, psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False
