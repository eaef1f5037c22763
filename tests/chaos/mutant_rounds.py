"""Rounds with mutants of the workers: under a few kills and refusals each has to leave what the checker finds.

The first one has no bug: under the same blows the checker must find nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from tests.chaos import checker
from tests.chaos.chaos_round import begin, drain, record
from tests.chaos.conductor import Conductor
from tests.chaos.field_of_work import SESSION_S, Field
from tests.chaos.findings import Findings
from tests.chaos.mutant_workers import WANTED
from tests.chaos.pace import NotObservedError
from tests.chaos.proxied_stack import ProxiedStack
from tests.chaos.report import MUTANTS, Report

ALL = ("", *WANTED)
BLOWS_MIN = {"kill": 3, "refuse": 3}
"""What every mutant gets at least; more, if it comes sooner."""
ZOMBIES_MIN = {"unfenced": 3}
"""One whose fold had nothing to do meanwhile harms nobody when it wakes up."""
BLOWS_S_MAX = 90.0
"""A mutant that survives what should end it never comes to its next blow."""
LONG_DEAD_S = 4 * SESSION_S
"""How long a zombie is stopped: until its fold has a new owner, which has done what the zombie is about to do again."""
PATIENCE_S = 8.0
"""A mutant may never come to its end; what it has done by then is looked at."""

PLANT = "plant"
"""What is found when a planted bug is another one than was meant."""
MISFITS = ("AttributeError", "ImportError", "NameError", "TypeError")
"""What Python says when a plant does not fit the product any more: the worker ends by it, and anything is lost."""
_MISFIT = re.compile(rf"\b({'|'.join(MISFITS)})(: |\()")
SHOWN_MAX = 300
"""Characters of a log's line on either side."""


async def run_all(stack: ProxiedStack, report: Report, console: Console, names: Sequence[str]) -> None:
    """These mutants in turn ("" has no bug); ``report`` says which were found, and by what."""
    for name in names:
        findings = await _one(stack, name, report.seed)
        broken = findings.broken()
        said = name or "no bug at all"
        if not name:
            report.figures |= {f"control: {figure}": count for figure, count in findings.figures.items()}
        told = f"        mutant worker, {said}: {', '.join(sorted(broken)) or 'nothing found'}"
        console.print(f"{told} ({findings.figures['blows']} blows)", highlight=False)
        if name:
            report.mutant(f"worker: {name}", broken & WANTED[name])
            report.problems += [
                (MUTANTS, f"{name} {text}") for invariant, text in findings.problems if invariant == PLANT
            ]
        else:
            report.problems += [(invariant, f"without a bug: {text}") for invariant, text in findings.problems]


async def _one(stack: ProxiedStack, mutant: str, seed: int) -> Findings:
    deployment = f"chaos-{seed}-{mutant or 'control'}"
    async with Field(deployment, seed, stack, mutant=mutant, few_jobs=True) as field:
        await begin(field)
        async with Conductor(field, zombie_s=LONG_DEAD_S) as conductor:
            conductor.arm_for_mutants()
            await conductor.blows(BLOWS_MIN | {"stop": ZOMBIES_MIN.get(mutant, 1)}, BLOWS_S_MAX)
            conductor.disarm()
        blows = len(field.fleet.noted())
        ended = True
        try:
            await drain(field, PATIENCE_S if mutant else 60.0)
        except NotObservedError:
            ended = False
        recording = await record(field, complete=ended)
        findings = checker.check(recording, field.load.ledger, field.http.told)
    findings.claim(PLANT, "logs say that the plant does not fit the worker", misfits(field.folder))
    shutil.rmtree(field.folder)
    findings.figures["blows"] = blows
    return findings


def misfits(folder: Path) -> Iterator[str]:
    """The lines of the logs that tell of an error which only a plant can have caused."""
    for log in sorted(folder.glob("*.log")):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := _MISFIT.search(line):
                yield f"{log.name}: ...{line[max(0, found.start() - SHOWN_MAX) : found.end() + SHOWN_MAX]}"
