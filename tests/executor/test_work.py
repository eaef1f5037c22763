"""What one attempt computes, without a process around it."""

from __future__ import annotations

from pathlib import Path

from settler_streams.core.matching import Rules
from settler_streams.events import InlineRecords, JobRequested, MatchRules
from settler_streams.executor.work import AttemptRows, run_job
from settler_streams.ids import TenantId
from tests.runtime.requests import ROW

TENANT = TenantId("0190a1b2-0000-7000-8000-0000000000a1")


def run(left: dict[str, str], right: dict[str, str], rules: MatchRules) -> AttemptRows:
    sides = (InlineRecords(rows=({**ROW, **fields},)) for fields in (left, right))
    return run_job(JobRequested(left=next(sides), right=next(sides), rules=rules), TENANT, Path("/nowhere"))


def test_the_defaults_of_the_event_hold_and_not_those_of_the_matching() -> None:
    assert MatchRules().keys != Rules().keys
    assert MatchRules().date_window_days != Rules().date_window_days
    assert run({"reference": "A"}, {"reference": "B"}, MatchRules()).match_count == 0
    assert run({"date": "2026-01-05"}, {"date": "2026-01-08"}, MatchRules()).match_count == 1
    assert run({"date": "2026-01-05"}, {"date": "2026-01-09"}, MatchRules()).match_count == 0


def test_a_rule_that_is_given_is_the_rule() -> None:
    assert run({"reference": "A"}, {"reference": "B"}, MatchRules(keys=())).match_count == 1
    assert run({"date": "2026-01-05"}, {"date": "2026-01-08"}, MatchRules(date_window_days=2)).match_count == 0
    assert run({"amount": "9.98"}, {}, MatchRules(amount_tolerance_minor=2)).match_count == 1


def test_the_counts_are_those_of_the_rows() -> None:
    attempt = run({"reference": "A"}, {"reference": "B"}, MatchRules())
    assert attempt.unmatched_count == sum(len(columns.side) for columns in attempt.unmatched) == 2
    assert sum(line.left_rows + line.right_rows for line in attempt.report) == 2
