"""What a check has counted, and every claim that does not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

EXAMPLES_MAX = 3
"""Offenders that a problem names: enough to look one up."""


@dataclass
class Findings:
    """Figures by name, and problems by invariant."""

    figures: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def claim(self, invariant: str, what: str, offenders: Collection[object] | Iterable[object]) -> None:
        """``offenders`` must be empty."""
        found = sorted(map(str, offenders))
        if found:
            self.problems.append((invariant, f"{len(found)} {what}: {'; '.join(found[:EXAMPLES_MAX])}"))

    def equal(self, invariant: str, what: str, found: object, wanted: object) -> None:
        """Two figures must agree."""
        if found != wanted:
            self.problems.append((invariant, f"{what}: {found}, not {wanted}"))

    def broken(self) -> set[str]:
        """The invariants that do not hold."""
        return {invariant for invariant, _ in self.problems}


def repeated(items: Iterable[object]) -> list[object]:
    """Those that occur more than once."""
    return [item for item, times in Counter(items).items() if times > 1]
