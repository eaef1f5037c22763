"""The end of the long round: a million made statements, which a tenant is answered alike whoever else is there.

On databases of its own (`python -m tests.isolation`), not on what the round has left: what the other tenants have is
varied there, and everything else is equal.
"""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from rich.console import Console

from tests.chaos.report import MADE, Report

STATEMENTS = 1_000_000
END_S_MAX = 60.0
"""A search that is told to stop ends with the 10,000 statements that are under way, which take some ten seconds."""
_LINES_KEPT = 20
"""Of what it says last, which is in the report when it fails: the statement, three answers, the command."""
_ASKED = re.compile(r"([\d,]+) statements answered alike")


async def ask(report: Report, console: Console, statements: int = STATEMENTS) -> None:
    """Ask them; ``report`` has how many were answered alike, and a problem unless all were."""
    asked, said = 0, list[str]()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.isolation", "--statements", str(statements), "--seed", str(report.seed),
        cwd=Path(__file__).parents[2], stdout=PIPE, stderr=STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            said = [*said, line.decode().rstrip()][-_LINES_KEPT:]
            if told := _ASKED.search(said[-1]):
                asked = int(told[1].replace(",", ""))
                console.print(f"        {said[-1]}", highlight=False)
        await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), END_S_MAX)
    report.figures["made statements answered alike"] = asked
    if process.returncode or asked != statements:
        report.problems.append((MADE, "\n".join(said)))
