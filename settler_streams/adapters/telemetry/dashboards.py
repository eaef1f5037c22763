"""The Grafana dashboards, as code: ``python -m settler_streams.adapters.telemetry.dashboards`` prints them.

``monitoring/grafana-dashboards.json`` is that output; a test holds the two equal.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, Literal

COLUMNS = 2
PANEL_WIDTH, PANEL_HEIGHT = 12, 8
"""Grafana's grid has 24 columns."""
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}

Unit = Literal["reqps", "s", "short", "percentunit", "ops"]


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph: a title that asks or answers something, queries with their legends, and the unit of its axis."""

    title: str
    unit: Unit
    queries: tuple[tuple[str, str], ...]
    limit: float | None = None


def _quantile(q: float, histogram: str, *by: str) -> str:
    rates = f"sum by ({', '.join((*by, 'le'))}) (rate({histogram}_bucket[$__rate_interval]))"
    return f"histogram_quantile({q}, {rates})"


def _mean(histogram: str, by: str) -> str:
    total, count = (f"sum by ({by}) (rate({histogram}_{part}[$__rate_interval]))" for part in ("sum", "count"))
    return f"{total} / {count}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel(
            "Requests by status",
            "reqps",
            (("sum by (status) (rate(http_requests_total[$__rate_interval]))", "{{status}}"),),
        ),
        Panel(
            "Errors (5xx)",
            "reqps",
            (('sum(rate(http_requests_total{status=~"5.."}[$__rate_interval]))', "5xx"),),
            limit=10,
        ),
        Panel(
            "Duration, p50 and p95",
            "s",
            tuple((_quantile(q, "http_request_duration_seconds"), f"p{round(q * 100)}") for q in (0.5, 0.95)),
            limit=2,
        ),
        Panel(
            "Requests by tenant",
            "reqps",
            (("topk(10, sum by (tenant) (rate(http_requests_total[$__rate_interval])))", "{{tenant}}"),),
        ),
    ),
    "Tenants": (
        Panel(
            "Nearest to a quota",
            "percentunit",
            (
                (
                    "topk(10, max by (tenant, quota) (tenant_quota_usage / tenant_quota_limit))",
                    "{{tenant}} {{quota}}",
                ),
            ),
            limit=0.9,
        ),
        Panel(
            "Rate limit hits",
            "ops",
            (("topk(10, sum by (tenant) (rate(tenant_rate_limit_hits_total[$__rate_interval])))", "{{tenant}}"),),
        ),
        Panel(
            "Tenant cache by outcome",
            "ops",
            (("sum by (outcome) (rate(settler_tenant_cache_total[$__rate_interval]))", "{{outcome}}"),),
        ),
        Panel(
            "Worker seconds per second",
            "short",
            (("topk(10, tenant:resource_usage_seconds:rate5m)", "{{tenant}}"),),
        ),
        Panel(
            "Noisy: times the average of the others",
            "short",
            (("max by (tenant, resource) (tenant_noisy_ratio)", "{{tenant}} {{resource}}"),),
            limit=3,
        ),
    ),
    "Jobs": (
        Panel(
            "Decisions by outcome",
            "ops",
            (("sum by (outcome) (rate(settler_jobs_decided_total[$__rate_interval]))", "{{outcome}}"),),
        ),
        Panel(
            "Finished by status",
            "ops",
            (("sum by (status) (rate(settler_jobs_finished_total[$__rate_interval]))", "{{status}}"),),
        ),
    ),
    "Webhooks": (
        Panel(
            "Requests by outcome",
            "reqps",
            (("sum by (outcome) (rate(settler_webhook_attempts_total[$__rate_interval]))", "{{outcome}}"),),
        ),
        Panel(
            "Deliveries that ended",
            "ops",
            (("sum by (outcome) (rate(settler_webhook_deliveries_total[$__rate_interval]))", "{{outcome}}"),),
        ),
        Panel(
            "Longest wait for a courier",
            "s",
            (("max(settler_webhook_queue_age_seconds)", "webhooks"),),
            limit=60,
        ),
    ),
    "Streams": (
        Panel(
            "Records per second by role",
            "ops",
            (("sum by (role) (rate(settler_step_records_total[$__rate_interval]))", "{{role}}"),),
        ),
        Panel(
            "Lag by role",
            "short",
            (("sum by (role) (settler_consumer_lag)", "{{role}}"),),
            limit=10_000,
        ),
        Panel(
            "Step time, p95",
            "s",
            ((_quantile(0.95, "settler_step_seconds", "role"), "{{role}}"),),
        ),
        Panel(
            "Records per step, mean",
            "short",
            ((_mean("settler_batch_records", "role"), "{{role}}"),),
        ),
        Panel(
            "Age of the folds' clocks",
            "s",
            (("max by (role) (settler_fold_now_age_seconds)", "{{role}}"),),
            limit=30,
        ),
        Panel(
            "Dead letters",
            "short",
            (("sum by (role, reason) (increase(settler_dead_letters_total[5m]))", "{{role}} {{reason}}"),),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model, with the alerts' limits drawn as lines."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "collapsed": False})
        y += 1
        for number, panel in enumerate(row):
            line, column = divmod(number, COLUMNS)
            panels.append(_panel(panel, column * PANEL_WIDTH, y + line * PANEL_HEIGHT))
        y += -(-len(row) // COLUMNS) * PANEL_HEIGHT
    for identifier, made in enumerate(panels, start=1):
        made["id"] = identifier
    return {
        "uid": "settler-streams",
        "title": "Settler streams",
        "tags": ["settler"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "utc",
        "panels": panels,
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.limit is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.limit}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["custom"] = {"thresholdsStyle": {"mode": "dashed"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": PANEL_WIDTH, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def rendered() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(rendered())
