"""What one attempt computes, without a process around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from settler_streams.core.matching import Rules
from settler_streams.events import InlineRecords, JobRequested, MatchRules
from settler_streams.executor.work import AttemptRows, run_job
from settler_streams.ids import TenantId
from settler_streams.published import SCHEMAS
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


def extremes() -> Iterator[tuple[str, Any]]:
    """Each rule of the published request at each of its bounds."""
    schema = json.loads((SCHEMAS / "events" / "settler.job.requested.v1.json").read_text())
    for name, rule in schema["$defs"]["MatchRules"]["properties"].items():
        match rule["type"]:
            case "integer":
                values = [rule["minimum"], rule["maximum"]]
            case "boolean":
                values = [False, True]
            case "string":
                values = re.findall(r"\w+", rule["pattern"])
            case "array":
                length = rule["items"]["maxLength"]
                values = [(), tuple(str(place) * length for place in range(rule["maxItems"]))]
        yield from ((name, value) for value in values)


@pytest.mark.parametrize(("name", "value"), list(extremes()), ids=lambda given: str(given)[:20])
def test_what_the_published_request_allows_is_a_rule(name: str, value: Any) -> None:
    rules = MatchRules(**{name: value})
    columns = dict.fromkeys(rules.keys, "A")
    assert run(columns, columns, rules).match_count == 1


def test_the_counts_are_those_of_the_rows() -> None:
    attempt = run({"reference": "A"}, {"reference": "B"}, MatchRules())
    assert attempt.unmatched_count == sum(len(columns.side) for columns in attempt.unmatched) == 2
    assert sum(line.left_rows + line.right_rows for line in attempt.report) == 2
