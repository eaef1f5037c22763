"""A process whose event loop stands still ends, and says where it stood; one that was frozen as a whole goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import asyncio, threading
from settler_streams.workers import loop_guard
loop_guard.BEAT_INTERVAL_S, loop_guard.BEATS_MISSED_MAX = 0.2, 5

def stuck():
    threading.Event().wait()

async def main():
    loop_guard.guard_loop(4)
    await asyncio.sleep({first_s})
    print("awake", flush=True)
    {then}

asyncio.run(main())
"""


def test_a_loop_that_stands_still_ends_the_process_and_its_place_is_on_standard_error() -> None:
    program = PROGRAM.format(first_s=1.5, then="stuck()")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 4
    assert "awake" in ended.stdout, "it had beaten until then"
    assert "in stuck" in ended.stderr


def test_a_process_that_was_frozen_goes_on() -> None:
    # It goes on until it is told, and then for as long as the guard takes to notice.
    program = PROGRAM.format(first_s=0.5, then="await asyncio.to_thread(input); await asyncio.sleep(1.5)")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "awake\n"
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(subprocess.TimeoutExpired):  # three times what the guard allows
            process.wait(timeout=3)
        os.kill(process.pid, signal.SIGCONT)
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.wait(timeout=90) == 0
