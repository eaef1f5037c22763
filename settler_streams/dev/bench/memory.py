"""How much memory a process holds, sampled while it works."""

from __future__ import annotations

from pathlib import Path

import psutil

from settler_streams.dev.stack import ChildProcess

MIB = 2**20


class Footprint:
    """The resident memory of one running process: samples in MiB, and its peak."""

    def __init__(self, process: ChildProcess) -> None:
        assert process.ref is not None  # noqa: S101 - it has been started
        self._process = psutil.Process(process.ref.pid)
        self.samples_mib: list[float] = []
        self._peak_mib = 0.0
        self.sample()

    def sample(self) -> float:
        """Note what it holds now."""
        self.samples_mib.append(self._process.memory_info().rss / MIB)
        self._peak_mib = max(self._peak_mib, self.samples_mib[-1], self._kernel_peak_mib())
        return self.samples_mib[-1]

    @property
    def peak_mib(self) -> float:
        """The most it has held: the kernel's own mark where there is one, else the greatest sample."""
        return self._peak_mib

    def _kernel_peak_mib(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return 0.0
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0
