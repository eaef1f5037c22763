"""What a stack remembers between two processes: ports, passwords and pids, in one private file under one lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from settler_streams.dev.stack.process import POLL_S, ProcessRef
from settler_streams.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD_BYTES = 24
"""192 random bits: beyond guessing, and free of characters that a URL would have to escape."""


class State(msgspec.Struct):
    """The content of ``state.json``."""

    ports: dict[str, int] = {}
    secrets: dict[str, str] = {}
    processes: dict[str, ProcessRef] = {}

    def secret(self, name: str) -> str:
        """The password of that name, made at its first use."""
        return self.secrets.setdefault(name, secrets.token_urlsafe(PASSWORD_BYTES))


class StateFile:
    """``state.json`` in the stack's folder, mode 0600, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> State:
        """The stored state; a new one where none is stored or what is stored cannot be read as one."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=State)
        except (FileNotFoundError, msgspec.DecodeError):
            return State()

    def save(self, state: State) -> None:
        """Replace the file: a reader, or a crash, sees the old content or the new, never a part."""
        write_private(self.path, msgspec.json.format(msgspec.json.encode(state)))


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 atomically and durably."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)


@contextlib.contextmanager
def locked(path: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold the lock file; the system releases it when the holder ends, however it ends.

    Raises:
        UnavailableError: another process held it past the deadline.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end_s = time.monotonic() + deadline_s
        while not try_lock(descriptor):
            if time.monotonic() >= end_s:
                raise UnavailableError(f"another process has held {path} for {deadline_s:g} s")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
