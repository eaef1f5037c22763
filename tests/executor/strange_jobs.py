"""Stand-ins for a job's work that end badly. Child processes import them, so they live apart from the tests."""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

from settler_streams.executor.work import AttemptRows, run_job


@dataclass(frozen=True)
class CrashOnce:
    """Takes its process with it the first time, and does the job from then on."""

    marker: str

    def __call__(self, *args: Any) -> AttemptRows:
        try:
            Path(self.marker).touch(exist_ok=False)
        except FileExistsError:
            return run_job(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class Held:
    """Does the job once somebody makes the file."""

    marker: str

    def __call__(self, *args: Any) -> AttemptRows:
        wait_for(self.marker)
        return run_job(*args)


def raise_bug(*_args: object) -> NoReturn:
    """An error that nobody foresaw."""
    raise LookupError("an internal matter")


def hang(*_args: object) -> NoReturn:
    """A job that never ends by itself."""
    while True:
        signal.pause()


def take_memory(*_args: object) -> NoReturn:
    """A job that takes a mebibyte after another."""
    taken = []
    while True:
        taken.append(bytearray(2**20))


def take_memory_in_polars(*_args: object) -> NoReturn:
    """The same where Python is not asked."""
    parts = []
    while True:
        parts.append(pl.Series([b"x" * 2**20]).sample(64, with_replacement=True).bin.encode("hex"))


def exit_politely(*_args: object) -> NoReturn:
    """What is no Exception."""
    raise SystemExit(3)


def leave(*_args: object) -> NoReturn:
    """A job that takes its process with it."""
    os._exit(3)


def add(left: int, right: int) -> int:
    """A job that is done at once."""
    return left + right


def wait_for(path: str) -> str:
    """A job that ends when somebody makes the file."""
    while not Path(path).exists():
        select.select([], [], [], 0.01)
    return path
