"""Ends the process when its event loop stands still: nothing that runs on the loop could notice."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger(__name__)

BEAT_INTERVAL_S = 5.0
BEATS_MISSED_MAX = 12
"""A minute. The longest work without a pause is one batch's decisions, a second or two. Beats are counted, not timed: a
process that was frozen has missed none."""


def guard_loop(exit_code: int) -> threading.Event:
    """Watch the running loop from a thread of its own; set the returned event to end the watch.

    When the loop stands still, every thread's stack is written to standard error and the process ends with
    ``exit_code``. Nothing is lost: an open transaction ends with its timeout or the next owner's fencing.
    """
    loop, ended, beat = asyncio.get_running_loop(), threading.Event(), threading.Event()

    def watch() -> None:
        missed = 0
        while not ended.wait(BEAT_INTERVAL_S):
            missed = 0 if beat.is_set() else missed + 1
            if missed >= BEATS_MISSED_MAX:
                log.error("the event loop stands still", for_s=missed * BEAT_INTERVAL_S)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                os._exit(exit_code)
            beat.clear()
            try:
                loop.call_soon_threadsafe(beat.set)
            except RuntimeError:
                return  # closed: the process is about to end

    beat.set()
    threading.Thread(target=watch, name="loop-guard", daemon=True).start()
    return ended


def awaited(task: asyncio.Task[Any]) -> str:
    """Where ``task`` waits, from its outermost coroutine to the innermost: ``run.py:60 _stop_all > ...``."""
    frames: list[str] = []
    at: Any = task.get_coro()
    while at is not None:
        if (frame := getattr(at, "cr_frame", None) or getattr(at, "gi_frame", None)) is not None:
            frames.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        at = getattr(at, "cr_await", None) or getattr(at, "gi_yieldfrom", None)
    return " > ".join(frames)
