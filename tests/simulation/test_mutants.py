"""The simulation is itself tested: each planted bug must be found, and soon."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.simulation.judge import judged
from tests.simulation.planted_bugs import MUTANTS
from tests.simulation.test_simulation import ROOT, told

SEEDS_MAX = 60
"""A planted bug that hides in more seeds than this would hide a real one as well."""
MISFITS = ("AttributeError(", "ImportError(", "NameError(", "TypeError(")
"""What Python says when a plant does not fit the product any more: that would be found whatever it was meant to be."""

REPLAY = """
import sys, pytest
from tests.simulation.planted_bugs import MUTANTS
target, *plants = sys.argv[1:]
with pytest.MonkeyPatch.context() as patch:
    for name in plants:
        MUTANTS[name](patch)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "every_guarantee", target]))
"""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    MUTANTS[name](monkeypatch)
    for seed in range(SEEDS_MAX):
        _, found = judged(seed)
        if found:
            assert not [text for text in found if any(kind in text for kind in MISFITS)], found
            record_property("seed", seed)
            record_property("found", found[0])
            return
    pytest.fail(f"{SEEDS_MAX} seeds have not noticed: {name}")


def test_what_is_printed_replays_the_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "merge before commit"
    with monkeypatch.context() as patch:
        MUTANTS[name](patch)
        seed, found = next((seed, found) for seed in range(SEEDS_MAX) if (found := judged(seed)[1]))
    printed = told(seed, found)
    planted = replayed(printed, name)
    assert (planted.returncode, found[0] in planted.stdout) == (pytest.ExitCode.TESTS_FAILED, True), planted.stdout
    mended = replayed(printed)
    assert mended.returncode == pytest.ExitCode.OK, mended.stdout


def replayed(printed: str, *plants: str) -> subprocess.CompletedProcess[str]:
    """Run what ``make`` would run for the printed command, with these bugs in the product."""
    words = shlex.split(printed.rsplit("replay it: ", 1)[1])
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    target = variables.pop("PYTEST_ARGS")
    return subprocess.run(
        [sys.executable, "-c", REPLAY, target, *plants],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
