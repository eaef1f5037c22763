"""Runs the Faust apps of some roles inside the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from settler_streams.runtime.app import FoldApp

START_S_MAX = 60.0
STOP_S_MAX = 30.0
"""Steps under way end within the drain deadline of ten seconds; the rest is leaving the groups."""


@asynccontextmanager
async def running(apps: Sequence[FoldApp]) -> AsyncIterator[Sequence[FoldApp]]:
    """Start ``apps`` with their tickers; stop them at the end, and fail if one of them had failed meanwhile."""
    tickers = [asyncio.create_task(app.ticker.run()) for app in apps if app.ticker is not None]
    try:
        async with asyncio.timeout(START_S_MAX):
            await asyncio.gather(*(app.start() for app in apps))
        yield apps
        for failure in [app.failure for app in apps if app.failure.done()]:
            raise AssertionError("an app failed") from failure.result()
    finally:
        for ticker in tickers:
            ticker.cancel()
        async with asyncio.timeout(STOP_S_MAX):
            await asyncio.gather(*(app.stop() for app in apps))
