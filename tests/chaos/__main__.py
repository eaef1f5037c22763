"""`python -m tests.chaos`: a round of faults over real services, and a check of everything it has left behind.

Exit code 0 when every invariant holds, 1 otherwise; the seed and the command that repeats the round are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import structlog
import uvloop
from rich.console import Console

from tests.chaos import checker, faults, made_statements, mutant_rounds, mutants
from tests.chaos.chaos_round import begin, drain, record
from tests.chaos.check_ends import wrong_ends
from tests.chaos.conductor import HITS_MIN, Conductor
from tests.chaos.fail_points import EXECUTOR_POINTS, OPEN_POINTS, REFUSED_POINTS, ROW_POINTS, STEP_POINTS, STOP_POINTS
from tests.chaos.field_of_work import MEMBERS, Field
from tests.chaos.pace import NotObservedError
from tests.chaos.proxied_stack import ProxiedStack
from tests.chaos.report import COVERAGE, ENDS, PROGRESS, Report

VERBS = {"short": "chaos", "long": "chaos-long", "mutants": "chaos-mutants"}
"""The rounds, and how `make` calls them."""
FAULTS_S = {"short": 0.0, "long": 1_080.0}
"""How long faults are struck at least; each has its turn once in any case. The check and made statements follow."""
MUTANT_TIMES = {"short": 1, "long": 3}
"""How often each mutant of the recording is planted, each time in another place."""
POINTS_S_MAX = 60.0
"""Longest stand-still while the last fail points are waited for, once the faults are through."""


@click.command()
@click.argument("name", type=click.Choice(list(VERBS)), default="short")
@click.option(
    "--mutant", "names", type=click.Choice(mutant_rounds.ALL), multiple=True,
    help="Of the mutants only this one; may be repeated.",
)  # fmt: skip
@click.option("--seed", type=int, default=None, help="Repeat a round; by default a new seed.")
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), default=None, help="Where the report goes as JSON."
)
def main(name: str, names: tuple[str, ...], seed: int | None, json_path: Path | None) -> None:
    """Disturb the system in every way we know, then check that nothing was lost, doubled, turned or crossed.

    The short round takes about six minutes; the long one thirty, with a million made statements; the mutants, shorter
    rounds with a bug planted in the workers, twenty-five.
    """
    if names and name != "mutants":
        raise click.UsageError("--mutant belongs to the mutants.")
    seed = secrets.randbelow(10**6) if seed is None else seed
    command = f"make {VERBS[name]} SEED={seed}"
    report = Report(name, seed, command)
    _quiet()
    console = Console(width=130)
    console.print(f"chaos: {name} round, seed {seed}", highlight=False)
    try:
        uvloop.run(_run(report, console, names))
    except asyncio.CancelledError:
        sys.exit(130)
    report.show(console)
    path = json_path or Path(tempfile.gettempdir()) / f"settler-chaos-{name}.json"
    report.write(path)
    console.print(f"JSON: {path}", highlight=False)
    sys.exit(1 if report.problems else 0)


async def _run(report: Report, console: Console, names: tuple[str, ...]) -> None:
    began_s = time.monotonic()
    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGTERM, signal.SIGINT):  # whoever ends the round gets its processes ended too
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    folder = Path(tempfile.mkdtemp(prefix="settler-chaos-stack-"))
    stack = ProxiedStack(folder / "state", list(MEMBERS))
    try:
        await asyncio.to_thread(stack.up)
        if report.name == "mutants":
            await mutant_rounds.run_all(stack, report, console, names or mutant_rounds.ALL)
        else:
            await _round(stack, report, console, began_s)
        if report.name == "long":
            await made_statements.ask(report, console)
    finally:
        await asyncio.to_thread(stack.destroy)
        shutil.rmtree(folder, ignore_errors=True)
        report.seconds = time.monotonic() - began_s


async def _round(stack: ProxiedStack, report: Report, console: Console, began_s: float) -> None:
    async with Field(f"chaos-{report.seed}", report.seed, stack) as field:
        try:
            await _play(field, report, console, began_s)
        except NotObservedError as error:
            report.problems.append((PROGRESS, str(error)))
        finally:
            _note(field, report)
    if report.problems:
        with contextlib.suppress(shutil.Error):  # of files that the broker has removed meanwhile
            shutil.copytree(stack.part("kafka").home, field.folder / "kafka")
        for invariant, problem in report.problems:  # at once: what a longer round does besides takes its time
            console.print(f"{invariant}: {problem}", highlight=False)
        console.print(f"logs of the processes and the broker, and what it held: {field.folder}", highlight=False)
    else:
        shutil.rmtree(field.folder)


async def _play(field: Field, report: Report, console: Console, began_s: float) -> None:
    loop, is_long = asyncio.get_running_loop(), report.name == "long"
    phases, mark_s = report.phases_s, began_s

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - began_s:5.0f} s  {text}", highlight=False)

    def done(phase: str) -> None:
        nonlocal mark_s
        now_s = time.monotonic()
        phases[phase], mark_s = now_s - mark_s, now_s
        say(f"{phase} done")

    await begin(field)
    done("start")
    async with Conductor(field, say) as conductor:
        report.recoveries_s = conductor.recoveries_s
        conductor.arm(3 * HITS_MIN if is_long else HITS_MIN)
        chosen = faults.long_list() if is_long else faults.short_list()
        await conductor.strike(chosen, loop.time() + FAULTS_S[report.name])
        await conductor.fail_points_met(POINTS_S_MAX)
        conductor.disarm()
    if not conductor.changes:
        report.problems.append((COVERAGE, "no tenant has changed its tier, limits or standing"))
    done("faults")
    await drain(field)
    recording = await record(field)
    done("drain")
    findings = checker.check(recording, field.load.ledger, field.http.told)
    report.figures = findings.figures
    report.problems += findings.problems
    done("check")
    if findings.problems:  # the topics end with the stack
        (field.folder / "recording.pickle").write_bytes(pickle.dumps(recording))
    else:
        times = MUTANT_TIMES[report.name]
        for mutant, caught in mutants.try_all(recording, field.load.ledger, field.http.told, field.seed, times).items():
            report.mutant(mutant, caught)
        done("mutants")


def _note(field: Field, report: Report) -> None:
    report.injected = field.injected
    noted = Counter(f"{note['action']}: {note['point']}" for note in field.fleet.noted())
    report.fail_points = noted
    for member in field.fleet.members.values():
        report.exits.update({str(code): count for code, count in member.codes.items()})
    for point in (*STEP_POINTS, *OPEN_POINTS, *ROW_POINTS, *EXECUTOR_POINTS):
        if noted[f"kill: {point}"] < HITS_MIN:
            report.problems.append((COVERAGE, f"{point} was reached {noted[f'kill: {point}']} times, not {HITS_MIN}"))
    for point in STOP_POINTS:
        if not noted[f"stop: {point}"]:
            report.problems.append((COVERAGE, f"nobody has stopped at {point}"))
    for point in REFUSED_POINTS:
        if noted[f"refuse: {point}"] < HITS_MIN:
            report.problems.append((COVERAGE, f"{point} was refused {noted[f'refuse: {point}']} times, not {HITS_MIN}"))
    report.problems += [(ENDS, end) for end in wrong_ends(field.folder)]
    for what in [what for what, count in field.injected.items() if not count]:
        report.problems.append((COVERAGE, f"{what}: there was nothing to strike"))


def _quiet() -> None:
    """What the clients of this process have to say about services that are down is expected here."""
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


if __name__ == "__main__":
    main()
