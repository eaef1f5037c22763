"""Who is frozen when a round comes to its end is woken: left so, it would end by nothing but SIGKILL."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import SimpleNamespace
from typing import Any

from tests.chaos import fleet
from tests.chaos.conductor import Conductor
from tests.chaos.pace import observe

ENDS_IN_ORDER = """
import os, signal, sys

def on_term(*_):
    if "freezes" in sys.argv:
        os.kill(os.getpid(), signal.SIGSTOP)
    sys.exit(0)

signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
while True:
    signal.pause()
"""


async def a_process(*arguments: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENDS_IN_ORDER, *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), 20.0)
    return process


async def test_a_process_that_is_frozen_on_its_way_out_ends() -> None:
    process = await a_process("freezes")
    process.send_signal(signal.SIGTERM)
    await fleet._ended(process, "it")
    assert process.returncode == 0


async def test_a_conductor_leaves_nobody_frozen() -> None:
    process = await a_process()

    def frozen() -> list[int]:
        return [process.pid] if fleet._is_stopped(process.pid) else []

    async def is_frozen() -> bool:
        return bool(frozen())

    field: Any = SimpleNamespace(seed=1, tenants={}, fleet=SimpleNamespace(frozen=frozen))
    try:
        async with Conductor(field, zombie_s=0.5):
            process.send_signal(signal.SIGSTOP)
            await observe("it is frozen", is_frozen, 10.0)
        assert not frozen()
    finally:
        process.kill()
        await process.wait()
