"""Ends a worker in which nothing moves while work waits.

Whatever has a deadline of its own ends by itself and says why. This is for what has none: a decision that never
returns, a client that sends no request any more, a broker that is gone for good.

It counts its own checks instead of reading a clock: a process that was frozen for minutes has missed none of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import structlog

from settler_streams.errors import StalledError, UnavailableError

log = structlog.get_logger(__name__)

CHECK_INTERVAL_S = 5.0
"""One request to the broker and role each time; it has until the next one to answer."""
CHECKS_MAX = 36
"""Three minutes without progress: more than any wait that ends by itself (an opening that loads nothing 120 s, the
three answers of a step 90 s, a rebalance 60 s, one statement in Postgres 30 s), less than the five minutes after which
the lag alert rings."""


class Standing(NamedTuple):
    """Where a fold stands: ``moved`` differs from an earlier one as soon as it gets anywhere; ``waits``: it should."""

    moved: tuple[int, ...]
    waits: bool


class Watched(Protocol):
    """An app, as the watchdog sees it."""

    role: str

    async def standings(self) -> Mapping[int, Standing]: ...

    def fail(self, reason: BaseException) -> None: ...


class Watchdog:
    """Watches the folds of one app. An idle fold never stalls: nothing waits for it."""

    def __init__(self, app: Watched) -> None:
        self._app = app
        self._unanswered = 0
        self._last: dict[int, tuple[int, ...]] = {}
        self._still: dict[int, int] = {}

    async def run(self) -> None:
        """Until cancelled, or until the app has failed."""
        while True:
            stalled, _ = await asyncio.gather(self.check(), asyncio.sleep(CHECK_INTERVAL_S))
            if stalled is not None:
                log.error("worker stalled", role=self._app.role, reason=str(stalled))
                self._app.fail(stalled)
                return

    async def check(self) -> StalledError | None:
        """Look once."""
        try:
            async with asyncio.timeout(CHECK_INTERVAL_S):
                standings = await self._app.standings()
        except (UnavailableError, TimeoutError):
            self._unanswered += 1
            return self._too_long(self._unanswered, "Kafka has not answered")
        self._unanswered = 0
        for partition, standing in standings.items():
            moves = not standing.waits or standing.moved != self._last.get(partition)
            self._still[partition] = 0 if moves else self._still[partition] + 1
            self._last[partition] = standing.moved
        for gone in self._last.keys() - standings.keys():
            del self._last[gone], self._still[gone]
        worst = max(self._still, key=self._still.__getitem__, default=None)
        if worst is None:
            return None
        return self._too_long(self._still[worst], f"partition {worst} has not moved while records wait")

    def _too_long(self, checks: int, what: str) -> StalledError | None:
        if checks < CHECKS_MAX:
            return None
        return StalledError(f"{self._app.role}: {what} for {checks * CHECK_INTERVAL_S:.0f} s")
