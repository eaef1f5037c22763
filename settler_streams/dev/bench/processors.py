"""Processor time of processes: how much they used, and how long they were kept waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from settler_streams.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds. ``waited_s`` is zero where the kernel does not tell."""

    used_s: float
    waited_s: float


class ProcessorTime:
    """What some processes spend from now on.

    Raises:
        UnavailableError: one of them has ended.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._before = self._now()

    def since(self) -> Spent:
        """What was spent since this object was made."""
        now = self._now()
        return Spent(now.used_s - self._before.used_s, max(0.0, now.waited_s - self._before.waited_s))

    def _now(self) -> Spent:
        used_s = waited_s = 0.0
        for pid in self._pids:
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess as error:
                raise UnavailableError(f"the process {pid} has ended during the measurement") from error
            used_s += times.user + times.system
            waited_s += _waited_s(pid)
        return Spent(used_s, waited_s)


def _waited_s(pid: int) -> float:
    """Linux counts for each thread the nanoseconds on a run queue; a thread that has ended is no longer counted."""
    waited_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            waited_ns += int(path.read_text().split()[1])
        except FileNotFoundError:  # the thread ended between the look and the reading
            continue
    return waited_ns / 1e9
