"""A worker process: the Faust apps of its roles side by side, until a signal or a failure.

The exit code says why it ended: 0 after a signal, 1 after an error, 2 when another owner has taken over, 3 when stored
state contradicts the log. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import structlog

from settler_streams.errors import FencedError, StateError
from settler_streams.runtime.app import FoldApp
from settler_streams.signals import stop_on_signals

log = structlog.get_logger(__name__)

STOP_DEADLINE_S = 15.0
"""Steps under way end within ten seconds (the drain deadline); the rest is leaving the consumer groups."""

EXIT_OK, EXIT_ERROR, EXIT_FENCED, EXIT_STATE = 0, 1, 2, 3


async def run(apps: Sequence[FoldApp]) -> int:
    """Run ``apps`` until SIGTERM, SIGINT or a failure; returns the exit code."""
    stop = stop_on_signals()
    tickers = [asyncio.create_task(app.ticker.run()) for app in apps if app.ticker is not None]
    failures = [app.failure for app in apps]
    try:
        await asyncio.gather(*(app.start() for app in apps))
        log.info("worker ready", roles=[app.conf.id for app in apps], pid=os.getpid())
        waited: list[asyncio.Future[Any]] = [stop, *failures, *tickers]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for ticker in tickers:
            ticker.cancel()
        await _stop_all(apps)
    return _exit_code([f.result() for f in failures if f.done()], [t for t in tickers if t.done()])


async def _stop_all(apps: Sequence[FoldApp]) -> None:
    try:
        async with asyncio.timeout(STOP_DEADLINE_S):
            await asyncio.gather(*(app.stop() for app in apps))
    except TimeoutError:
        log.exception("worker did not stop in time", deadline_s=STOP_DEADLINE_S)


def _exit_code(failures: Sequence[BaseException], tickers: Sequence[asyncio.Task[None]]) -> int:
    errors = [*failures, *(e for t in tickers if not t.cancelled() and (e := t.exception()) is not None)]
    for error in errors:
        log.error("worker failed", error=repr(error), exc_info=error)
    if not errors:
        return EXIT_OK
    if any(isinstance(error, FencedError) for error in errors):
        return EXIT_FENCED
    return EXIT_STATE if any(isinstance(error, StateError) for error in errors) else EXIT_ERROR
