"""Tasks that run for as long as their process: one that ends by an error says so."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

log = structlog.get_logger(__name__)


def in_background(work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    """Start ``work``. Whoever started it keeps the task, and asks it whether it still runs."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("background task ended", task=task.get_name(), error=repr(error), exc_info=error)
