"""The simulation is itself tested: each planted bug must be found, and soon."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.judge import judged
from tests.simulation.planted_bugs import MUTANTS

SEEDS_MAX = 60
"""A planted bug that hides in more seeds than this would hide a real one as well."""
MISFITS = ("AttributeError(", "ImportError(", "NameError(", "TypeError(")
"""What Python says when a plant does not fit the product any more: that would be found whatever it was meant to be."""


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
