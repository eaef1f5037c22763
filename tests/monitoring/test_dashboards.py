"""The dashboards show metrics that exist, and the committed file is what the code says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from settler_streams.adapters.telemetry import dashboards
from tests.monitoring.test_alerts import ALERTS, MONITORING, RECORDED, exposed, metrics_in

PANELS = [panel for panel in dashboards.dashboard()["panels"] if panel["type"] != "row"]


def test_the_committed_dashboards_are_the_generated_ones() -> None:
    assert (MONITORING / "grafana-dashboards.json").read_text() == dashboards.rendered()


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_names_metrics_that_exist(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        named = metrics_in(target["expr"])
        assert named
        assert named <= exposed() | RECORDED


def test_panels_do_not_overlap_and_have_titles_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboards.dashboard()["panels"]:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        cells |= taken
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


@pytest.mark.parametrize(
    "metric",
    [
        "http_requests_total", "http_request_duration_seconds_bucket", "tenant_quota_usage",
        "tenant_rate_limit_hits_total", "tenant:resource_usage_seconds:rate5m",
    ],
)  # fmt: skip
def test_the_specifications_metrics_are_shown(metric: str) -> None:
    assert metric in json.dumps(PANELS)


def test_lines_are_drawn_where_alerts_fire() -> None:
    limits = {p["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"]
              for p in PANELS if "thresholds" in p["fieldConfig"]["defaults"]}  # fmt: skip
    fires_above = " ".join(alert["expr"] for alert in ALERTS)
    for limit in limits:
        assert f"> {limit:g}" in fires_above or f"> {limit}" in fires_above
