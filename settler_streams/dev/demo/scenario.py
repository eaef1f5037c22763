"""What the demo does: who the tenants are, what each submits, and what is meant to go wrong."""

from __future__ import annotations

from dataclasses import dataclass

from settler_streams.events import MatchRules, TenantTier
from settler_streams.reconciliation.generator import RULES

SEED = 2026
"""Everything that is made up follows from this number."""
ROWS_PER_SET = 150
"""Rows of each generated record set: a job is then a few milliseconds of real work."""
SETS_PER_TENANT = 4
KILLED_FLAG = "jobs.reconciliation-preview"
"""Kind of job that is switched off for everyone while the demo runs."""

MATCH_RULES = MatchRules(
    keys=RULES.keys,
    amount_tolerance_minor=RULES.amount_tolerance_minor,
    date_window_days=RULES.date_window_days,
    mode=RULES.mode,
    group_size_max=RULES.group_size_max,
)
"""The rules under which the generated sets have a known truth."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one tenant submits: ``jobs`` in all, ``per_second`` of them a second, each for one of its record sets."""

    name: str
    tier: TenantTier
    jobs: int
    per_second: float
    role: str
    preview_jobs: int = 0


LOADS = (
    Load("Acme Holding", TenantTier.ENTERPRISE, 36, 3, "steady, in the reserved lane"),
    Load("Birch Retail", TenantTier.SCALE, 50, 4, "steady"),
    Load("Cedar Logistics", TenantTier.GROWTH, 720, 60, "floods: far above its 20 requests a second"),
    Load("Dune Studio", TenantTier.STARTER, 40, 3, "steady, and asks for a kind that is switched off", preview_jobs=1),
    Load("Elm Street Books", TenantTier.FREE, 45, 3.5, "asks for more than its 60 requests a minute"),
)
"""Named so that the table reads from A to E; the flood is the one that a neighbour must not feel."""
