"""Couriers as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from settler_streams.settings import Settings


@contextlib.asynccontextmanager
async def courier_process(settings: Settings, log: Path) -> AsyncIterator[Process]:
    """`settler courier`, its log in a file."""
    with log.open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "settler_streams.cli.main", "courier",
            env={**os.environ, **settings.environment(), "SETTLER_LOG_LEVEL": "debug"}, stderr=err,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
