"""Every metric of the system, by the specification's names, with bounded label sets.

A process stays under 5,000 series whatever the number of tenants: :mod:`.tenant_labels` bounds the tenants, and every
other label takes its values from the code or the topology.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from settler_streams.adapters.telemetry.tenant_labels import Foremost, TenantLabels
from settler_streams.events import (
    JobDecided,
    JobFinished,
    JobStatus,
    Part,
    QuotaThreshold,
    QuotaType,
    RejectReason,
    Resource,
    TenantNoisy,
    TenantQuiet,
    TenantUsage,
)
from settler_streams.ids import TenantId
from settler_streams.settings import Settings

HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 10.0)
"""Bucket bounds; the alert's two seconds are one of them, so its quantile is exact there."""
STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0)
"""A step takes one Kafka transaction, some milliseconds; at thirty seconds it is given up."""
WEBHOOK_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""An endpoint has thirty seconds at most."""
BATCH_RECORDS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000)

_MICROS = 1_000_000
_TENANT = "tenant"
_ADMITTED = "admitted"


class Metrics:
    """The metrics of one process. :data:`METRICS` is the process's own; tests make others."""

    def __init__(self, registry: CollectorRegistry = prometheus_client.REGISTRY) -> None:
        self.registry = registry
        counter: Callable[..., Counter] = partial(Counter, registry=registry)
        gauge: Callable[..., Gauge] = partial(Gauge, registry=registry)
        summary: Callable[..., Summary] = partial(Summary, registry=registry)
        histogram: Callable[..., Histogram] = partial(Histogram, registry=registry)

        self.http_requests = counter(
            "http_requests_total", "HTTP requests answered, by tenant and status code", (_TENANT, "status")
        )
        self.http_request_duration = histogram(
            "http_request_duration_seconds",
            "From the request's head to the response's end, by method and route template",
            ("method", "route"),
            buckets=HTTP_SECONDS,
        )
        self.quota_usage = gauge(
            "tenant_quota_usage", "Used of a quota, in its own unit; the tenants nearest to a limit", (_TENANT, "quota")
        )
        self.quota_limit = gauge("tenant_quota_limit", "Limit of a quota, in its own unit", (_TENANT, "quota"))
        self.quota_thresholds = counter(
            "settler_quota_thresholds_total", "Thresholds reached, all tenants", ("quota", "percent")
        )
        self.rate_limit_hits = counter(
            "tenant_rate_limit_hits_total", "Job requests refused by the rate limit", (_TENANT,)
        )
        self.resource_usage = summary("tenant_resource_usage_seconds", "Worker time of finished jobs", (_TENANT,))
        self.jobs_decided = counter(
            "settler_jobs_decided_total", "Job requests decided, by outcome: admitted, or the reason", ("outcome",)
        )
        self.jobs_finished = counter("settler_jobs_finished_total", "Jobs finished, by status", ("status",))
        self.noisy_signals = counter(
            "settler_noisy_signals_total", "Tenants found noisy, and quiet again", ("signal", "resource")
        )
        self.noisy_ratio = gauge(
            "tenant_noisy_ratio", "Use of a noisy tenant over the average of the others", (_TENANT, "resource")
        )

        self.tenant_cache_outcomes = counter(
            "settler_tenant_cache_total", "What became of uses of the tenant cache, by outcome", ("outcome",)
        )

        self.batch_records = histogram(
            "settler_batch_records", "Records of one committed step", ("role",), buckets=BATCH_RECORDS
        )
        self.step_seconds = histogram(
            "settler_step_seconds", "Time of one committed step", ("role",), buckets=STEP_SECONDS
        )
        self.step_records = counter("settler_step_records_total", "Records consumed by committed steps", ("role",))
        self.dead_letters = counter("settler_dead_letters_total", "Dead letters written", ("role", "reason"))
        self.consumer_lag = gauge(
            "settler_consumer_lag", "Committed records not yet consumed", ("role", "topic", "partition")
        )
        self.fold_now_age = gauge(
            "settler_fold_now_age_seconds", "How far a fold's clock lies behind the wall clock", ("role", "partition")
        )

        self.webhook_attempts = counter(
            "settler_webhook_attempts_total",
            "Requests to webhooks, by outcome: delivered, refused, gone, timeout, unreachable, forbidden",
            ("outcome",),
        )
        self.webhook_attempt_seconds = histogram(
            "settler_webhook_attempt_seconds", "Time of one request to a webhook", buckets=WEBHOOK_SECONDS
        )
        self.webhook_deliveries = counter(
            "settler_webhook_deliveries_total", "Webhook deliveries that ended: delivered, or dead", ("outcome",)
        )
        self.webhook_queue_age = gauge(
            "settler_webhook_queue_age_seconds", "How long the webhook that waits longest for a courier has waited"
        )

        # Looking a label up costs a microsecond; these are met once per job.
        self._by_outcome = {
            outcome: self.jobs_decided.labels(outcome) for outcome in (_ADMITTED, *(r.value for r in RejectReason))
        }
        self._by_status = {status: self.jobs_finished.labels(status.value) for status in JobStatus}
        self._seconds_of: dict[str, Summary] = {}

        self._active = TenantLabels(self._forget_active)
        self._near_limit = Foremost(self._forget_quotas)
        self._noisy = Foremost(self._forget_noisy)
        self._observers: dict[type[Any], Callable[[Any, TenantId], None]] = {
            JobDecided: self._decided,
            JobFinished: self._finished,
            TenantUsage: self._metered,
            QuotaThreshold: self._threshold,
            TenantNoisy: self._became_noisy,
            TenantQuiet: self._became_quiet,
        }
        self.wanted = frozenset(self._observers)
        """The types of events that any metric counts."""

    def observe_all(self, events: Iterable[tuple[Part, TenantId]]) -> None:
        """As :meth:`observe` for each; decisions, of which a step has thousands, are counted first and added once."""
        outcomes: dict[RejectReason | None, int] = {}
        for event, tenant in events:
            if type(event) is JobDecided and event.reason is not RejectReason.RATE_LIMIT:
                outcomes[event.reason] = outcomes.get(event.reason, 0) + 1
            else:
                self.observe(event, tenant)
        for reason, count in outcomes.items():
            self._by_outcome[_ADMITTED if reason is None else reason.value].inc(count)

    def observe(self, event: Part, tenant: TenantId) -> None:
        """Count one published event, after its step has committed. Cheap for events that no metric wants."""
        observer = self._observers.get(type(event))
        if observer is not None:
            observer(event, tenant)

    def http_request(self, method: str, route: str, status: int, seconds: float | None, tenant: TenantId) -> None:
        """Count one answered request. ``route`` is the template, never the path; the platform's tenant if unknown.

        ``seconds`` is ``None`` for a stream, which lasts as long as its reader likes.
        """
        self.http_requests.labels(self._active.label(tenant), str(status)).inc()
        if seconds is not None:
            self.http_request_duration.labels(method, route).observe(seconds)

    def rate_limited(self, tenant: TenantId) -> None:
        """A request of ``tenant`` was refused by its rate limit."""
        self.rate_limit_hits.labels(self._active.label(tenant)).inc()

    def tenant_cache(self, outcome: str) -> None:
        """One use of the tenant cache ended so.

        Of reads: hit, miss, outdated (older than this process knows of), foreign (not what was stored), bypassed (the
        tenant changes were not heard). Of stores: stored, stale-write and lease-ended (refused), too-large. Of any
        call: error (no answer in time), lost (not asked).
        """
        self.tenant_cache_outcomes.labels(outcome).inc()

    def step_committed(self, role: str, records: int, seconds: float) -> None:
        """One step of ``role`` has committed."""
        self.batch_records.labels(role).observe(records)
        self.step_seconds.labels(role).observe(seconds)
        self.step_records.labels(role).inc(records)

    def fold_closed(self, role: str, topics: tuple[str, ...], partition: int) -> None:
        """The fold went to another process: what was last known here about its lag and clock is no longer true."""
        for topic in topics:
            self.consumer_lag.remove_by_labels({"role": role, "topic": topic, "partition": str(partition)})
        self.fold_now_age.remove_by_labels({"role": role, "partition": str(partition)})

    def _decided(self, decided: JobDecided, tenant: TenantId) -> None:
        self._by_outcome[_ADMITTED if decided.reason is None else decided.reason.value].inc()
        if decided.reason is RejectReason.RATE_LIMIT:
            self.rate_limited(tenant)

    def _finished(self, finished: JobFinished, tenant: TenantId) -> None:
        self._by_status[finished.status].inc()
        label = self._active.label(tenant)
        seconds = self._seconds_of.get(label)
        if seconds is None:
            seconds = self._seconds_of[label] = self.resource_usage.labels(label)
        seconds.observe(finished.worker_us / _MICROS)

    def _metered(self, usage: TenantUsage, tenant: TenantId) -> None:
        figures = _quota_figures(usage)
        if not figures or not self._near_limit.admit(tenant, max(used / limit for used, limit in figures.values())):
            return
        for quota, (used, limit) in figures.items():
            self.quota_usage.labels(tenant, quota.value).set(used)
            self.quota_limit.labels(tenant, quota.value).set(limit)

    def _threshold(self, reached: QuotaThreshold, _tenant: TenantId) -> None:
        self.quota_thresholds.labels(reached.quota.value, str(reached.percent)).inc()

    def _became_noisy(self, noisy: TenantNoisy, tenant: TenantId) -> None:
        ratio = math.inf if noisy.ratio_per_mille is None else noisy.ratio_per_mille / 1000
        self.noisy_signals.labels("noisy", noisy.resource).inc()
        if self._noisy.admit(tenant, ratio):
            self.noisy_ratio.labels(tenant, noisy.resource).set(ratio)

    def _became_quiet(self, quiet: TenantQuiet, tenant: TenantId) -> None:
        self.noisy_signals.labels("quiet", quiet.resource).inc()
        self.noisy_ratio.remove_by_labels({_TENANT: tenant, "resource": quiet.resource})

    def _forget_active(self, tenant: TenantId) -> None:
        self._seconds_of.pop(tenant, None)
        for metric in (self.http_requests, self.rate_limit_hits, self.resource_usage):
            metric.remove_by_labels({_TENANT: tenant})

    def _forget_quotas(self, tenant: TenantId) -> None:
        for quota in QuotaType:  # by `remove_by_labels` every series would be looked at, for each tenant that goes
            self.quota_usage.remove(tenant, quota.value)
            self.quota_limit.remove(tenant, quota.value)

    def _forget_noisy(self, tenant: TenantId) -> None:
        self.noisy_ratio.remove_by_labels({_TENANT: tenant})


def _quota_figures(usage: TenantUsage) -> dict[QuotaType, tuple[int, int]]:
    """Used and limit of each quota that has a limit; of the rate limit, the burst that is used up."""
    used = {
        QuotaType.STORAGE: usage.used.get(Resource.STORAGE_BYTES, 0),
        QuotaType.CUSTOM_DOMAINS: usage.used.get(Resource.CUSTOM_DOMAINS, 0),
        QuotaType.MONTHLY_RECONCILIATIONS: usage.used.get(Resource.RECONCILIATIONS, 0),
        QuotaType.CONCURRENT_JOBS: usage.running,
        QuotaType.RATE_LIMIT: usage.rate_tokens_used,
    }
    limits = {**usage.limits, QuotaType.RATE_LIMIT: usage.rate_burst}
    return {quota: (used[quota], limit) for quota, limit in limits.items() if limit > 0}


# The moment at which each series began would double the number of series.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

METRICS = Metrics()
"""The metrics of this process."""

observe = METRICS.observe


def serve_metrics(settings: Settings) -> int:
    """Serve ``/metrics`` from a thread of its own, until the process ends; returns the port.

    Raises:
        OSError: the port is taken.
    """
    server, _thread = prometheus_client.start_http_server(
        settings.metrics_port, addr=settings.gateway_host, registry=METRICS.registry
    )
    return int(server.server_port)
