"""The report of a round: what was done to the system, what was counted, what does not hold; as tables, as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.checker import INVARIANTS

PROGRESS = "progress"
PROGRESS_MEANING = "after each fault every partition decides again and jobs finish; all comes to its end"
COVERAGE = "coverage"
COVERAGE_MEANING = "every fail point is reached as often as planned"
ENDS = "ends"
ENDS_MEANING = "a worker that fails says why, and only for a reason that a fault gives it"
MUTANTS = "mutants"
MUTANTS_MEANING = "every planted error makes the checker fail"
MADE = "non-interference"
MADE_MEANING = "what a tenant is told of a made statement is the same whatever the others have"


@dataclass
class Report:
    """One round, as far as it came."""

    name: str
    seed: int
    command: str
    seconds: float = 0.0
    injected: Counter[str] = field(default_factory=Counter)
    fail_points: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)
    phases_s: dict[str, float] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)
    mutants: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def mutant(self, name: str, caught: set[str]) -> None:
        """What became of one planted error."""
        self.mutants[name] = ", ".join(sorted(caught)) or "NOBODY"
        if not caught:
            self.problems.append((MUTANTS, f"nobody has found: {name}"))

    @property
    def meanings(self) -> dict[str, str]:
        """Every claim of this round and what it means."""
        meanings = dict(INVARIANTS)
        if self.name != "mutants":  # at whose rounds only the checker looks
            meanings |= {PROGRESS: PROGRESS_MEANING, COVERAGE: COVERAGE_MEANING, ENDS: ENDS_MEANING}
        meanings |= {MUTANTS: MUTANTS_MEANING} if self.mutants else {}
        return meanings | ({MADE: MADE_MEANING} if self.name == "long" else {})

    def as_json(self) -> dict[str, Any]:
        """Everything, for a machine."""
        return {
            "round": self.name,
            "seed": self.seed,
            "repeat_with": self.command,
            "seconds": round(self.seconds, 1),
            "phases_s": {name: round(value, 1) for name, value in self.phases_s.items()},
            "faults": dict(self.injected),
            "fail_points": dict(self.fail_points),
            "exits": dict(self.exits),
            "recovery_s_max": round(max(self.recoveries_s, default=0.0), 1),
            "figures": self.figures,
            "invariants": {name: self._count(name) for name in self.meanings},
            "mutants": self.mutants,
            "problems": [list(problem) for problem in self.problems],
        }

    def write(self, path: Path) -> None:
        """As a JSON file."""
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """As tables."""
        tables = (
            (f"faults, seed {self.seed}", ("kind", "count"), sorted(self.injected.items())),
            ("fail points: what a process did to itself there", ("place", "count"), sorted(self.fail_points.items())),
            ("what was counted", ("figure", "count"), list(self.figures.items())),
            ("mutants", ("planted error", "caught by"), list(self.mutants.items())),
        )
        for title, heads, told in tables:
            if told:
                console.print(_table(title, heads, told))
        rows = [(name, meaning, self._count(name)) for name, meaning in self.meanings.items()]
        console.print(_table("invariants", ("name", "claim", "violations"), rows))
        longest = max(self.recoveries_s, default=0.0)
        phases = ", ".join(f"{name} {value:.0f} s" for name, value in self.phases_s.items())
        course = f" ({phases}); longest recovery {longest:.1f} s; exits {dict(self.exits)}" if phases else ""
        console.print(f"{self.seconds:.0f} s{course}")
        for name, text in self.problems:
            console.print(f"[red]{name}[/red]: {text}", highlight=False, soft_wrap=True)
        if self.problems:
            console.print(f"to repeat: {self.command}", highlight=False)

    def _count(self, invariant: str) -> int:
        return sum(name == invariant for name, _ in self.problems)


def _table(title: str, heads: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head in ("count", "violations") else "left")
    for row in rows:
        table.add_row(*map(str, row))
    return table
