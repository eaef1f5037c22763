"""The services as child processes of this machine, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from pathlib import Path

import psutil

from settler_streams.dev.stack import EmbeddedStack, PartName
from settler_streams.dev.stack.state import try_lock
from tests.services.interface import Service, Services

_PREFIX = "settler-test-"
PAUSE_S_MAX = 10.0
"""Threads stop within microseconds, unless the kernel is at work for one."""


class EmbeddedService(Service):
    """A part of the stack."""

    def __init__(self, stack: EmbeddedStack, part: PartName) -> None:
        self.name = part  # type: ignore[misc]
        self._stack = stack
        self._part: PartName = part

    def start(self) -> None:
        self._stack.up({self._part})

    def stop(self) -> None:
        self._stack.part(self._part).stop()

    def kill(self) -> None:
        self._stack.part(self._part).kill()

    def pause(self) -> None:
        """Returns when every thread has stopped: until then one may still answer."""
        deadline_s = time.monotonic() + PAUSE_S_MAX
        self._signal_tree(signal.SIGSTOP)
        while not all(_is_stopped(process) for process in self._tree()):
            assert time.monotonic() < deadline_s, f"{self.name} did not stop within {PAUSE_S_MAX} s"
            self._signal_tree(signal.SIGSTOP)  # one may have been born meanwhile

    def resume(self) -> None:
        self._signal_tree(signal.SIGCONT)

    @property
    def running(self) -> bool:
        return self._stack.part(self._part).running

    def _signal_tree(self, signum: signal.Signals) -> None:
        """PostgreSQL serves each connection in a process of its own, so the whole tree has to hang."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that served a connection has ended meanwhile
                process.send_signal(signum)

    def _tree(self) -> list[psutil.Process]:
        part = self._stack.part(self._part)
        if part.running and part.process.ref is not None and (root := part.process.ref.find()) is not None:
            return [root, *root.children(recursive=True)]
        return []


def _is_stopped(process: psutil.Process) -> bool:
    """Whether all its threads are; a thread is a process of its own to the system."""
    try:
        threads = [process, *(psutil.Process(each.id) for each in process.threads())] if psutil.LINUX else [process]
        return all(each.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) for each in threads)
    except psutil.NoSuchProcess:
        return True  # it has ended meanwhile


class EmbeddedServices(Services):
    """One stack of its own for this test session.

    The session holds a lock file beside the stack's folder. The system releases it however the session ends, so the
    next session knows which stacks were left by one that was killed, and removes them.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        token = secrets.token_hex(4)
        self._lock_path = parent / f"{_PREFIX}{token}.lock"
        unheld = parent / f"{_PREFIX}{token}.new"
        self._lock = os.open(unheld, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try_lock(self._lock)
        unheld.rename(self._lock_path)  # under this name nobody has ever seen it unheld
        home = parent / f"{_PREFIX}{token}"
        self._data = parent / f"{_PREFIX}{token}-data"
        self._stack = EmbeddedStack(home, environ={"SETTLER_DATA_DIR": str(self._data)})
        self.settings = self._stack.up(())
        self.kafka = EmbeddedService(self._stack, "kafka")
        self.postgres = EmbeddedService(self._stack, "postgres")
        self.valkey = EmbeddedService(self._stack, "valkey")

    def close(self) -> None:
        try:
            for service in (self.kafka, self.postgres, self.valkey):
                service.resume()  # a test that failed may have left one paused, and such a one cannot stop in order
            self._stack.destroy()
            if self._data.exists():
                shutil.rmtree(self._data)
        finally:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    for lock_path in parent.glob(f"{_PREFIX}*.lock"):
        try:
            if lock_path.stat().st_uid != os.geteuid():
                continue
            descriptor = os.open(lock_path, os.O_RDWR)
        except FileNotFoundError:
            continue  # its session has ended in order, or another one has removed what it had left
        try:
            if try_lock(descriptor):
                home = lock_path.with_suffix("")
                EmbeddedStack(home, environ={}).destroy()
                shutil.rmtree(home.with_name(home.name + "-data"), ignore_errors=True)
                lock_path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
