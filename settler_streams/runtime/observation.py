"""What a step did: noted while it runs, counted once it has committed. An aborted step leaves no trace in metrics."""

from __future__ import annotations

import time

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.core.fold import Emit


class Observation:
    """The notes of one step of ``role``."""

    def __init__(self, role: str, partition: int) -> None:
        self._role = role
        self._partition = str(partition)
        self._began_s = time.perf_counter()
        self._published: list[Emit] = []
        self._dead_letters: list[str] = []
        self.outputs = 0
        """How many events the step publishes."""

    def published(self, emit: Emit) -> None:
        """An event of a type that METRICS wants is part of the step."""
        self._published.append(emit)

    def dead_letter(self, reason: str) -> None:
        """A record was refused."""
        self._dead_letters.append(reason)

    def committed(self, records: int, now_ms: int | None = None) -> None:
        """Count it all. ``now_ms`` is the fold's clock, where it has one."""
        METRICS.step_committed(self._role, records, time.perf_counter() - self._began_s)
        METRICS.observe_all((emit.data, emit.tenant) for emit in self._published)
        for reason in self._dead_letters:
            METRICS.dead_letters.labels(self._role, reason).inc()
        if now_ms is not None:
            METRICS.fold_now_age.labels(self._role, self._partition).set(max(0.0, time.time() - now_ms / 1000))
