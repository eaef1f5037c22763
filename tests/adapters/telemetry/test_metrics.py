"""The metrics: what events do to them, and that tenants in any number leave a process with few series."""

from __future__ import annotations

import random
import urllib.request

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from settler_streams.adapters.telemetry import tenant_labels
from settler_streams.adapters.telemetry.metrics import METRICS, Metrics, serve_metrics
from settler_streams.adapters.telemetry.tenant_labels import LABELLED_MAX, OTHER, TenantLabels
from settler_streams.events import (
    JobDecided,
    JobFinished,
    JobStatus,
    QueuePriority,
    QuotaThreshold,
    QuotaType,
    RejectReason,
    Resource,
    TenantNoisy,
    TenantQuiet,
    TenantUsage,
)
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

SERIES_MAX = 5_000
TENANTS = 100_000


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def decided(reason: RejectReason | None = None) -> JobDecided:
    return JobDecided(
        job_id="j", admitted=reason is None, kind="k", priority=QueuePriority.NORMAL, requested_at_ms=0,
        decided_at_ms=1, reason=reason,
    )  # fmt: skip


def finished(worker_us: int) -> JobFinished:
    return JobFinished(
        job_id="j", status=JobStatus.SUCCEEDED, attempt=1, kind="k", requested_at_ms=0, finished_at_ms=1,
        worker_us=worker_us,
    )  # fmt: skip


def usage(storage: int, limit: int = 100) -> TenantUsage:
    return TenantUsage(
        as_of_ms=0, window_start_ms=0, window_end_ms=1, used={Resource.STORAGE_BYTES: storage}, running=3,
        limits={QuotaType.STORAGE: limit, QuotaType.CUSTOM_DOMAINS: 0, QuotaType.RATE_LIMIT: 1200},
        rate_tokens_used=150, rate_burst=200,
    )  # fmt: skip


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def series(metrics: Metrics) -> int:
    return sum(len(family.samples) for family in metrics.registry.collect())


def test_a_rate_limited_request_is_a_hit(metrics: Metrics) -> None:
    metrics.observe(decided(), "a")
    metrics.observe(decided(RejectReason.RATE_LIMIT), "a")
    metrics.observe(decided(RejectReason.CONCURRENT_JOBS), "a")
    assert value(metrics, "tenant_rate_limit_hits_total", tenant="a") == 1
    assert value(metrics, "settler_jobs_decided_total", outcome="admitted") == 1
    assert value(metrics, "settler_jobs_decided_total", outcome="concurrent_jobs") == 1


def test_a_finished_job_adds_its_worker_seconds(metrics: Metrics) -> None:
    metrics.observe(finished(1_500_000), "a")
    metrics.observe(finished(500_000), "a")
    assert value(metrics, "tenant_resource_usage_seconds_sum", tenant="a") == 2
    assert value(metrics, "tenant_resource_usage_seconds_count", tenant="a") == 2


def test_a_usage_report_sets_the_quotas_that_have_a_limit(metrics: Metrics) -> None:
    metrics.observe(usage(91), "a")
    assert value(metrics, "tenant_quota_usage", tenant="a", quota="storage") == 91
    assert value(metrics, "tenant_quota_limit", tenant="a", quota="storage") == 100
    assert value(metrics, "tenant_quota_usage", tenant="a", quota="rate_limit") == 150
    assert value(metrics, "tenant_quota_limit", tenant="a", quota="rate_limit") == 200
    assert value(metrics, "tenant_quota_limit", tenant="a", quota="custom_domains") is None


def test_the_tenants_nearest_to_a_limit_are_never_hidden(metrics: Metrics) -> None:
    for number in range(1_000):
        metrics.observe(usage(80 + number % 10, 100_000), f"quiet-{number}")
    metrics.observe(usage(95), "full")
    assert value(metrics, "tenant_quota_usage", tenant="full", quota="storage") == 95
    assert series(metrics) < SERIES_MAX


def test_a_threshold_counts_for_every_tenant(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.observe(QuotaThreshold(quota=QuotaType.STORAGE, percent=90, used=9, limit=10, window_start_ms=0), "any")
    assert value(metrics, "settler_quota_thresholds_total", quota="storage", percent="90") == 3


def test_a_noisy_tenant_shows_until_it_is_quiet(metrics: Metrics) -> None:
    noisy = TenantNoisy(
        resource="worker_us", window_start_ms=0, window_ms=60_000, used=4, others_average=1, ratio_per_mille=4_000,
        tenants=9,
    )  # fmt: skip
    metrics.observe(noisy, "a")
    assert value(metrics, "tenant_noisy_ratio", tenant="a", resource="worker_us") == 4
    metrics.observe(TenantQuiet(resource="worker_us", window_start_ms=60_000), "a")
    assert value(metrics, "tenant_noisy_ratio", tenant="a", resource="worker_us") is None
    assert value(metrics, "settler_noisy_signals_total", signal="noisy", resource="worker_us") == 1


def test_a_fold_that_went_elsewhere_takes_its_lag_with_it(metrics: Metrics) -> None:
    for partition in ("0", "1"):
        metrics.consumer_lag.labels("admission", "job-requests", partition).set(7)
        metrics.fold_now_age.labels("admission", partition).set(0.5)
    metrics.fold_closed("admission", ("job-requests",), 0)
    assert value(metrics, "settler_consumer_lag", role="admission", topic="job-requests", partition="0") is None
    assert value(metrics, "settler_consumer_lag", role="admission", topic="job-requests", partition="1") == 7
    assert value(metrics, "settler_fold_now_age_seconds", role="admission", partition="0") is None


@pytest.mark.slow
def test_a_hundred_thousand_tenants_keep_a_process_under_five_thousand_series(metrics: Metrics) -> None:
    dice = random.Random(7)  # noqa: S311
    topology = load_topology()
    for number in range(TENANTS):
        tenant = f"tenant-{number}" if number % 3 else f"tenant-{dice.randrange(20)}"
        metrics.observe(decided(RejectReason.RATE_LIMIT), tenant)
        metrics.observe(finished(1_000), tenant)
        metrics.observe(usage(number % 100), tenant)
        metrics.http_request("POST", "/v1/jobs", dice.choice((202, 400, 404, 409, 429, 500, 503)), 0.01, tenant)
        if number % 10 == 0:
            metrics.observe(
                TenantNoisy(resource="worker_us", window_start_ms=0, window_ms=1, used=4, others_average=1,
                            ratio_per_mille=3_000 + number % 1_000, tenants=9), tenant,
            )  # fmt: skip
    for route in range(30):
        for method in ("GET", "POST", "PUT", "DELETE"):
            metrics.http_request(method, f"/v1/{route}", 200, 0.01, "tenant-0")
    for fold in (*topology.folds, *topology.projections):
        metrics.step_committed(fold.role, 10, 0.01)
        metrics.dead_letters.labels(fold.role, "schema").inc()
        for topic in fold.inputs:
            for partition in range(topology.partitions(topic)):
                metrics.consumer_lag.labels(fold.role, topic, str(partition)).set(1)
    assert series(metrics) < SERIES_MAX
    # Nothing is lost: what has no label of its own is counted as other, and busy tenants have one.
    hits = [s for f in metrics.registry.collect() if f.name == "tenant_rate_limit_hits" for s in f.samples]
    assert OTHER in {sample.labels["tenant"] for sample in hits}
    assert {f"tenant-{number}" for number in range(20)} <= {sample.labels["tenant"] for sample in hits}
    assert len(hits) <= LABELLED_MAX + 1


def test_labels_follow_activity_without_flickering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_labels, "RANKING_EVERY", 100)
    gone: list[str] = []
    labels = TenantLabels(gone.append, labelled_max=2)
    assert [labels.label(t) for t in ("a", "b", "c")] == ["a", "b", OTHER]
    for _ in range(97):
        labels.label("c")
    assert labels.label("c") == "c"
    assert len(gone) == 1
    kept = ({"a", "b"} - set(gone)).pop()
    for _ in range(400):  # nearly as active as one that has a label: no change
        labels.label("c")
        labels.label(kept)
        labels.label("d")
    assert labels.label("d") == OTHER
    assert len(gone) == 1


def test_memory_of_activity_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = TenantLabels(lambda _tenant: None)
    for number in range(50_000):
        labels.label(f"t-{number}")
    assert len(labels._activity) <= tenant_labels.REMEMBERED_MAX + tenant_labels.RANKING_EVERY


def test_a_process_serves_its_metrics() -> None:
    METRICS.step_committed("admission", 3, 0.01)
    port = serve_metrics(Settings(metrics_port=0))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert {"role": "admission"} in [sample.labels for sample in families["settler_step_records"].samples]
    assert {"http_requests", "http_request_duration_seconds", "tenant_quota_usage", "tenant_rate_limit_hits",
            "tenant_resource_usage_seconds"} <= set(families)  # fmt: skip
