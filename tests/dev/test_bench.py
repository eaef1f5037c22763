"""A small run of the whole benchmark, on services of its own: every key, and counts that are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from settler_streams.dev.bench import latency, report, row_security
from settler_streams.dev.bench.ground import prepared
from settler_streams.dev.bench.hops import HOPS
from settler_streams.dev.bench.run import PARTS, Figures, Sizes, run
from settler_streams.dev.stack.probes import apart

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

REQUESTS = 3_000
SIZES = Sizes(
    requests=REQUESTS,
    rounds=1,
    recovery_keys=4_000,
    recorded_jobs=500,
    row_security=row_security.Sizes(tenants=100, runs=10, blocks=2),
    latency=latency.Sizes(idle_jobs=5, tenant_changes=4, burst_jobs=10, half_load_s=2.0),
    tenants=100,
)


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run keeps its services."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def figures(state_dir: Path) -> Figures:
    """What a run measures."""

    async def work() -> Figures:
        async with prepared(state_dir, print) as ground:
            return await run(ground, SIZES, PARTS)

    return apart(work)


@pytest.fixture(scope="module")
def document(figures: Figures) -> dict[str, Any]:
    """The run's JSON, read back."""
    found: dict[str, Any] = json.loads(report.as_text(report.document(figures)))
    return found


def test_every_figure_is_there(document: dict[str, Any]) -> None:
    rates = (
        "stock_faust_eps",
        "ceiling_eps",
        "pipeline_eps",
        "pipeline_two_workers_eps",
        "recovery_keys_per_s",
        "recorder_rows_per_s",
        "peak_rss_mib",
    )
    assert {rate for rate in rates if document[rate] > 0} == set(rates)
    for what in ("latency_idle_ms", "latency_half_load_ms", "tenant_change_ms"):
        assert set(document[what]) == {"p50", "p99"}
        assert 0 < document[what]["p50"] <= document[what]["p99"]
    for when in ("latency_idle_ms", "latency_half_load_ms"):
        hops = document[when.replace("_ms", "_hops_ms")]
        assert set(hops) == set(HOPS)
        assert hops["executor"] > 0
    assert document["machine"]["cpus"] >= 1


def test_the_cost_of_row_level_security_is_told_of_every_statement(document: dict[str, Any]) -> None:
    costs = document["row_security"]
    assert set(costs) == {
        *row_security.READS, *(f"statement: {read}" for read in row_security.READS),
        *(f"recorder: {topic}" for topic in row_security.WRITES), row_security.CONTROL,
    }  # fmt: skip
    for cost in costs.values():
        assert 0 < cost["p50_ms"] <= cost["p95_ms"]
    together = [document["row_security_gateway"], document["row_security_recorder"]]
    for cost in (*costs.values(), *together, *(each["single_calls"] for each in together)):
        assert cost["ratio_p95"] > 0
        assert cost["ratio_p95_error"] >= 0


def test_every_program_got_the_same_requests_and_answered_each(document: dict[str, Any]) -> None:
    for program, runs in document["rounds"].items():
        assert [run["events"] for run in runs] == [REQUESTS], program
    for program in ("pipeline", "pipeline_two_workers"):
        (one,) = document["rounds"][program]
        assert one["admitted"] + sum(one["refused"].values()) == REQUESTS
        assert one["admitted"] > REQUESTS / 2
        assert "unknown_tenant" not in one["refused"]
        assert 0 < one["broker_share"] < 1


def test_the_table_shows_every_figure(document: dict[str, Any]) -> None:
    shown = "\n".join(" ".join(row) for row in report.rows(document))
    for letter in "abcdefg":
        assert f"({letter}) " in shown
    assert f"{document['pipeline_eps']:,} events/s" in shown


def test_nothing_is_left_of_it(figures: Figures, state_dir: Path) -> None:
    assert figures.pipeline
    assert list(state_dir.iterdir()) == []
