"""How a process is told to stop: the first signal asks, a second one ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal

import structlog

log = structlog.get_logger(__name__)

EXIT_FORCED = 130
"""The exit code after a second signal."""


def stop_on_signals() -> asyncio.Future[None]:
    """A future that is done once SIGTERM or SIGINT has come."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(name: str) -> None:
        if stop.done():
            os._exit(EXIT_FORCED)
        log.info("stopping", signal=name)
        stop.set_result(None)

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal, signum.name)
    return stop
