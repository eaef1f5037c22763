"""Stand-ins for a job's work that end badly. Child processes import them, so they live apart from the tests."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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


def raise_bug(*_args: object) -> NoReturn:
    """An error that nobody foresaw."""
    raise LookupError("an internal matter")


def hang(*_args: object) -> NoReturn:
    """A job that never ends by itself."""
    while True:
        signal.pause()
