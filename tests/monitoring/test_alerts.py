"""Every alert is about metrics that exist, and says where to read what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from settler_streams.adapters.telemetry.metrics import HTTP_SECONDS, Metrics

PROMTOOL = shutil.which("promtool")
ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "monitoring"
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
PROMQL = {
    "absent", "and", "by", "count", "histogram_quantile", "increase", "max", "offset", "or", "rate", "scalar", "sum",
    "topk", "unless",
}  # fmt: skip


def exposed() -> set[str]:
    """Every sample name that a process can expose."""
    registry = CollectorRegistry()
    Metrics(registry)
    return set(registry._names_to_collectors)


def metrics_in(expression: str) -> set[str]:
    """The names in a PromQL expression that are not its own words, labels, or durations."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)|\boffset \w+|\"[^\"]*\"", " ", expression)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - PROMQL


def runbook_sections() -> set[str]:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "SRE_RUNBOOK.md").read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or rule.get("record"))


def test_the_specifications_alerts_are_there() -> None:
    assert {"HighErrorRate", "HighLatency", "QuotaExhaustion", "NoisyNeighbor"} <= {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_expression_names_metrics_that_exist(rule: dict[str, Any]) -> None:
    named = metrics_in(rule["expr"])
    assert named
    assert named <= exposed() | RECORDED | {"up"}


def test_a_name_that_does_not_exist_would_be_noticed() -> None:
    assert metrics_in('sum by (tenant) (rate(no_such_metric{status="5.."}[5m])) > 3') == {"no_such_metric"}
    assert "no_such_metric" not in exposed()


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_every_alert_has_a_runbook_section(rule: dict[str, Any]) -> None:
    document, _, section = rule["annotations"]["runbook_url"].partition("#")
    assert document == "docs/SRE_RUNBOOK.md"
    assert section in runbook_sections()
    assert rule["annotations"]["summary"]
    assert rule["labels"]["severity"] in {"page", "ticket"}


def test_links_within_the_runbook_lead_somewhere() -> None:
    links = re.findall(r"\]\(#([^)]+)\)", (ROOT / "docs" / "SRE_RUNBOOK.md").read_text())
    assert links
    assert set(links) <= runbook_sections()


def test_metrics_in_the_runbook_exist() -> None:
    text = (ROOT / "docs" / "SRE_RUNBOOK.md").read_text()
    named = set(re.findall(r"\b(?:tenant|settler|http)_[a-z0-9_]+\b", text))
    assert named <= exposed() | {"tenant_quota_usage"}


def test_the_latency_limit_is_a_bucket_bound() -> None:
    assert 2.0 in HTTP_SECONDS


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "arguments", [("check", "rules", "prometheus-rules.yml"), ("test", "rules", "prometheus-rules-test.yml")]
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    ended = subprocess.run([str(PROMTOOL), *arguments], cwd=MONITORING, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr).decode()
