"""A worker process: the Faust apps of its roles side by side, until a signal or a failure.

The exit code says why it ended: 0 after a signal, 1 after an error, 2 when another owner has taken over, 3 when stored
state contradicts the log, 4 when nothing moved while work waited. A second signal ends it at once, with 130.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import structlog

from settler_streams.errors import FencedError, StalledError, StateError
from settler_streams.runtime.app import FoldApp
from settler_streams.signals import stop_on_signals
from settler_streams.workers.loop_guard import awaited, guard_loop

log = structlog.get_logger(__name__)

STOP_DEADLINE_S = 15.0
"""Steps under way end within ten seconds (the drain deadline); the rest is leaving the consumer groups."""
CANCEL_DEADLINE_S = 3.0
"""For the tickers to hand over what they have sent: a tick that is not taken is followed by the next owner's."""
EXIT_DEADLINE_S = 5.0
"""What is left after the apps have stopped is closing the loop, unless something in it refuses to end."""

COLLECT_AFTER = (50_000, 20, 100)
"""A batch makes tens of thousands of objects that live until its end, so the collector's usual 700 would look through
them all time and again: 11 % of a step, against 3 % with these (measured on admission)."""

EXIT_OK, EXIT_ERROR, EXIT_FENCED, EXIT_STATE, EXIT_STALLED = 0, 1, 2, 3, 4
_EXIT_OF = {FencedError: EXIT_FENCED, StateError: EXIT_STATE, StalledError: EXIT_STALLED}
"""In this order: a worker that another one has replaced may see other errors on its way out."""


async def run(apps: Sequence[FoldApp]) -> int:
    """Run ``apps`` until SIGTERM, SIGINT or a failure; returns the exit code.

    Raises:
        SettlerError: an app did not start; the others are stopped.
    """
    stop = stop_on_signals()
    gc.set_threshold(*COLLECT_AFTER)
    log.info("worker starting", roles=[app.conf.id for app in apps], pid=os.getpid())
    ended = guard_loop(EXIT_STALLED)
    tickers = [asyncio.create_task(app.ticker.run()) for app in apps if app.ticker is not None]
    failures = [app.failure for app in apps]
    starting = asyncio.ensure_future(asyncio.gather(*(app.start() for app in apps)))
    ends: list[asyncio.Future[Any]] = [stop, *failures, *tickers]
    try:
        await asyncio.wait([starting, *ends], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            log.info("worker ready", roles=[app.conf.id for app in apps], pid=os.getpid())
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    except Exception as error:
        log.exception("worker did not start", error=repr(error))  # here, since the process may have to be ended
        raise
    finally:
        under_way: list[asyncio.Future[Any]] = [starting, *tickers]
        for task in under_way:
            task.cancel()
        await asyncio.wait(under_way, timeout=CANCEL_DEADLINE_S)
        await _stop_all(apps)
        ended.set()
    return _exit_code([f.result() for f in failures if f.done()], [t for t in tickers if t.done()])


def leave(exit_code: int) -> None:
    """End the process within :data:`EXIT_DEADLINE_S`, whatever refuses to; to be called last."""
    timer = threading.Timer(EXIT_DEADLINE_S, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()


async def _stop_all(apps: Sequence[FoldApp]) -> None:
    """Bounded, though Faust's services pass over the cancellation of what they wait for: :func:`leave` is for those."""
    stops = [asyncio.create_task(app.stop(), name=app.conf.id) for app in apps]
    stopped, late = await asyncio.wait(stops, timeout=STOP_DEADLINE_S)
    if late:
        apps_late = sorted(task.get_name() for task in late)
        waits = Counter(map(awaited, asyncio.all_tasks())).most_common()
        log.error("worker did not stop in time", deadline_s=STOP_DEADLINE_S, late=apps_late, waits=waits)
    for task in stopped:
        task.result()


def _exit_code(failures: Sequence[BaseException], tickers: Sequence[asyncio.Task[None]]) -> int:
    errors = [*failures, *(e for t in tickers if not t.cancelled() and (e := t.exception()) is not None)]
    for error in errors:
        log.error("worker failed", error=repr(error), exc_info=error)
    if not errors:
        return EXIT_OK
    return next((code for kind, code in _EXIT_OF.items() if any(isinstance(e, kind) for e in errors)), EXIT_ERROR)
