"""What projections write of one record of each topic, for the measurement of what row-level security costs them."""

from __future__ import annotations

from collections.abc import Callable

from settler_streams.adapters.postgres import projection
from settler_streams.adapters.postgres.effects import (
    AuditEntry,
    Execution,
    Flag,
    JobDecision,
    JobResult,
    QuotaUsage,
    Signal,
    Usage,
    WebhookEvent,
)
from settler_streams.ids import TenantId

Effects = Callable[[TenantId, str, int], projection.RecordEffects]
"""Of a tenant, a job of its own, and the record's version."""
MINUTES = 10
"""Windows of usage that a tenant's records fall into."""
WANTED_AT_MS = 4_102_444_800_000
"""When webhooks' events came: after the webhooks, whenever those were made."""


def _decision(tenant_id: TenantId, job_id: str, version: int) -> projection.RecordEffects:
    """Of a new job."""
    return (
        JobDecision(
            tenant_id=tenant_id,
            job_id=job_id,
            kind="reconciliation",
            priority="normal",
            decision="admitted",
            requested_at_ms=1,
            decided_at_ms=2,
            source_version=version,
        ),
    )


def _result(tenant_id: TenantId, job_id: str, version: int) -> projection.RecordEffects:
    """Of a job with a decision."""
    result = JobResult(
        tenant_id=tenant_id,
        job_id=job_id,
        outcome="succeeded",
        accepted_attempt=1,
        finished_at_ms=3,
        source_version=version,
    )
    execution = Execution(
        tenant_id=tenant_id,
        job_id=job_id,
        attempt=1,
        executor="e",
        status="succeeded",
        source_version=version,
        finished_at_ms=3,
        worker_us=1000,
    )
    return result, execution


def _usage(tenant_id: TenantId, _job_id: str, version: int) -> projection.RecordEffects:
    """Of a minute, which other records add to."""
    return (
        Usage(
            tenant_id=tenant_id,
            resource="requests",
            window_start_ms=60_000 * (version % MINUTES),
            window_seconds=60,
            quantity=1,
            source_version=version,
        ),
    )


def _signals(tenant_id: TenantId, job_id: str, version: int) -> projection.RecordEffects:
    """A quota's use and a verdict."""
    used = QuotaUsage(tenant_id=tenant_id, quota_type="storage", used=version, reserved=0, source_version=version)
    verdict = Signal(
        tenant_id=tenant_id,
        signal_id=job_id,
        kind="noisy",
        resource="requests",
        detail={},
        signalled_at_ms=1,
        source_version=version,
    )
    return used, verdict


def _flag(tenant_id: TenantId, job_id: str, version: int) -> projection.RecordEffects:
    """A flag that changes, and its entry in the audit log."""
    flag = Flag(
        tenant_id=tenant_id,
        flag="f",
        scope="tenant",
        enabled=bool(version % 2),
        definition={},
        changed_by="b",
        changed_at_ms=1,
        source_version=version,
    )
    entry = AuditEntry(
        tenant_id=tenant_id, id=job_id, actor="b", action="flag.changed", subject="flag/f", recorded_at_ms=1
    )
    return flag, entry


def _webhook_event(tenant_id: TenantId, job_id: str, version: int) -> projection.RecordEffects:
    """One that the tenant's webhook wants."""
    return (
        WebhookEvent(
            tenant_id=tenant_id,
            event_id=job_id,
            event_type="settler.job.finished.v1",
            body="{}",
            appended_at_ms=WANTED_AT_MS,
            source_version=version,
        ),
    )


WRITES = {
    "job-decisions": _decision,
    "job-results": _result,
    "usage-events": _usage,
    "tenant-signals": _signals,
    "flag-changes": _flag,
    "webhooks": _webhook_event,
}
"""What a projection makes of a record, by topic; in this order, since a result changes the row of a decision."""
