"""A child process that outlives a Ctrl-C of its parent, can be found again by another process, and stops on time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from settler_streams.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

POLL_S = 0.02
"""How often a condition is looked at: short beside the quickest start (0.1 s), and still under 1 % of a core."""

START_TIME_SLACK_S = 2.0
"""The system's idea of its boot time, and so of every start time, moves by a second when its clock is set."""

KILL_S_MAX = 10.0
"""The kernel ends a killed process at once unless it hangs in a disk call; beyond this the machine is ill."""

TAIL_LINES = 20
"""Lines of a log that an error quotes: enough for one Java stack trace's head."""


class Account(msgspec.Struct, frozen=True):
    """The user and group that a child runs as."""

    uid: int
    gid: int


class ProcessRef(msgspec.Struct, frozen=True):
    """A process that a later process can recognise: a reused pid has another start time (Unix seconds)."""

    pid: int
    started_s: float

    def find(self) -> psutil.Process | None:
        """The process while it lives; None once it has ended, or when its pid belongs to another."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started_s) <= START_TIME_SLACK_S
        except psutil.NoSuchProcess:
            return None
        return process if same and lives(process) else None


class ChildProcess:
    """One supervised process with a log file.

    It runs in a session of its own, so neither a Ctrl-C in the terminal nor the end of its parent reaches it: who
    starts it also stops it, or leaves its :attr:`ref` where the next one finds it (:meth:`adopt`).

    Args:
        name: how messages call it.
        command: the program and its arguments. Arguments are visible to every user of the machine: no secrets.
        log: gets standard output and error; the log of the run before is kept beside it as ``<log>.previous``.
        cwd: an existing folder.
        environ: the complete environment of the child; None: that of this process.
        account: the user to run as; None: the present one.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path,
        environ: Mapping[str, str] | None = None,
        account: Account | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.cwd = cwd
        self.environ = None if environ is None else dict(environ)
        self.account = account
        self.ref: ProcessRef | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> ProcessRef:
        """Spawn the process; it is not ready yet. Does nothing when it already runs."""
        if self.ref is not None and self.running:
            return self.ref
        if self.log.exists():
            self.log.replace(self.log.with_name(self.log.name + ".previous"))
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            try:
                self._popen = subprocess.Popen(  # noqa: S603 - the command is ours, and no shell reads it
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=self.cwd,
                    env=self.environ,
                    start_new_session=True,
                    user=None if self.account is None else self.account.uid,
                    group=None if self.account is None else self.account.gid,
                    extra_groups=None if self.account is None else [],
                )
            except OSError as error:
                raise UnavailableError(f"{self.name} cannot be started: {error}") from error
        self.ref = ProcessRef(self._popen.pid, psutil.Process(self._popen.pid).create_time())
        return self.ref

    def adopt(self, ref: ProcessRef) -> bool:
        """Take over a process that another parent started; False when it no longer lives."""
        if ref.find() is None:
            return False
        self.ref, self._popen = ref, None
        return True

    @property
    def running(self) -> bool:
        """Whether the process lives, and so may hold its port and its files. Reaps a child that has ended."""
        if self._popen is not None:
            return self._popen.poll() is None
        return self.ref is not None and self.ref.find() is not None

    def wait_until(self, ready: Callable[[], bool], *, deadline_s: float) -> None:
        """Wait until ``ready()``, which must itself be quick.

        Raises:
            UnavailableError: the process ended first, or the deadline passed; the message quotes the log's end.
        """
        end_s = time.monotonic() + deadline_s
        while True:
            if not self.running:
                raise UnavailableError(f"{self.name} ended before it was ready; its log ends:\n{self.log_tail()}")
            if ready():
                return
            if time.monotonic() >= end_s:
                raise UnavailableError(
                    f"{self.name} not ready after {deadline_s:g} s; its log ends:\n{self.log_tail()}"
                )
            time.sleep(POLL_S)

    def wait_for_line(self, text: str, *, deadline_s: float) -> None:
        """Wait until a line of this run's log contains ``text``; errors as :meth:`wait_until`."""
        needle = text.encode()
        self.wait_until(lambda: needle in self.log.read_bytes(), deadline_s=deadline_s)

    def wait_for_port(self, port: int, *, host: str = "127.0.0.1", deadline_s: float) -> None:
        """Wait until the TCP port accepts connections; errors as :meth:`wait_until`."""
        self.wait_until(lambda: accepts(host, port), deadline_s=deadline_s)

    def stop(self, *, deadline_s: float, signum: signal.Signals = signal.SIGTERM) -> bool:
        """Ask the process to end; past the deadline, kill its group. True: it ended by itself (or had already).

        Raises:
            UnavailableError: even SIGKILL did not end it within ten seconds.
        """
        self.send(signum)
        self.send(signal.SIGCONT)  # a stopped process would not see the other one
        if self._ended_within(deadline_s):
            return True
        self.kill()
        return False

    def kill(self) -> None:
        """SIGKILL the process and its group, as a crash would, and wait for its end."""
        if self.ref is not None and self.running:
            try:
                os.killpg(self.ref.pid, signal.SIGKILL)  # the child leads its session, so also its group
            except ProcessLookupError:
                return
            if not self._ended_within(KILL_S_MAX):
                raise UnavailableError(f"{self.name} (pid {self.ref.pid}) survived SIGKILL for {KILL_S_MAX:g} s")

    def send(self, signum: signal.Signals) -> None:
        """Send a signal if the process still lives (SIGSTOP and SIGCONT serve chaos tests)."""
        if self.running and self.ref is not None and (process := self.ref.find()) is not None:
            try:
                process.send_signal(signum)
            except psutil.NoSuchProcess:
                return  # it ended between the look and the signal: what the caller wants

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the log of this run, or a note that there are none."""
        if not self.log.exists():
            return "(no log)"
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) or "(empty)"

    def _ended_within(self, deadline_s: float) -> bool:
        end_s = time.monotonic() + deadline_s
        while self.running:
            if time.monotonic() >= end_s:
                return False
            time.sleep(POLL_S)
        return True


def accepts(host: str, port: int) -> bool:
    """Whether a TCP connection is accepted within a fifth of a second (loopback needs microseconds)."""
    try:
        socket.create_connection((host, port), timeout=0.2).close()
    except OSError:
        return False
    return True


def processes_of(executable: Path, cwd: Path) -> list[psutil.Process]:
    """The live processes that run this very program in this very folder, whoever started them."""
    program, folder = executable.resolve(), cwd.resolve()
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            runs_here = Path(process.exe()) == program and Path(process.cwd()) == folder
            if runs_here and lives(process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # ended meanwhile, or another user's: not ours either way
    return found


def end_all(processes: Iterable[psutil.Process], *, deadline_s: float, signum: signal.Signals = signal.SIGTERM) -> None:
    """End processes that lost their parent: first ``signum``, past the deadline SIGKILL.

    Raises:
        UnavailableError: one survived SIGKILL for ten seconds.
    """
    alive = list(processes)
    for step, patience_s in ((signum, deadline_s), (signal.SIGKILL, KILL_S_MAX)):
        for process in alive:
            try:
                process.send_signal(step)
            except psutil.NoSuchProcess:
                continue
        end_s = time.monotonic() + patience_s
        while alive := [process for process in alive if lives(process)]:
            if time.monotonic() >= end_s:
                break
            time.sleep(POLL_S)
    if alive:
        raise UnavailableError(f"processes survived SIGKILL: {[process.pid for process in alive]}")


def lives(process: psutil.Process) -> bool:
    """Whether any thread of the process still runs: the first may be a zombie while others still hold its sockets."""
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
