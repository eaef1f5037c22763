"""The recorder agent: decisions, results, signals, usage and flags become rows in Postgres, under row-level security.

Each batch is one transaction per input partition, together with the position behind it.
"""

from __future__ import annotations

from settler_streams.adapters.postgres.effects import (
    AuditEntry,
    Effect,
    Execution,
    Flag,
    JobDecision,
    JobResult,
    QuotaUsage,
    Signal,
    Usage,
)
from settler_streams.core.fold import Record
from settler_streams.errors import RecordError
from settler_streams.events import (
    FlagChanged,
    JobDecided,
    JobFinished,
    QuotaThreshold,
    QuotaType,
    Resource,
    TenantAcknowledged,
    TenantForgotten,
    TenantNoisy,
    TenantQuiet,
    TenantUsage,
)
from settler_streams.ids import TenantId
from settler_streams.runtime.app import Batches

ROLE = "recorder"

_RESOURCE_OF_QUOTA = {
    QuotaType.STORAGE: Resource.STORAGE_BYTES,
    QuotaType.MONTHLY_RECONCILIATIONS: Resource.RECONCILIATIONS,
    QuotaType.CUSTOM_DOMAINS: Resource.CUSTOM_DOMAINS,
}


async def recorder(batches: Batches) -> None:
    """Project whatever has arrived."""
    async for batch in batches:
        async with batch.step() as step:
            for record in step.decode():
                step.write(step.project(effects_of, record))


def effects_of(record: Record) -> tuple[Effect, ...]:
    """The rows that one event leads to.

    Raises:
        RecordError: the event does not belong into any of the recorder's topics.
    """
    match record.event.data:
        case JobDecided() as decided:
            return (_decision(record, decided),)
        case JobFinished() as finished:
            return _result(record, finished)
        case TenantUsage() as usage:
            return _usage(record, usage)
        case FlagChanged() as changed:
            return _flag(record, changed)
        case QuotaThreshold() as threshold:
            reached = {"percent": threshold.percent, "used": threshold.used, "limit": threshold.limit}
            return (_signal(record, "quota-threshold", threshold.quota, {**reached}),)
        case TenantNoisy() as noisy:
            detail: dict[str, int | None] = {
                "used": noisy.used,
                "others_average": noisy.others_average,
                "ratio_per_mille": noisy.ratio_per_mille,
                "window_start_ms": noisy.window_start_ms,
                "window_ms": noisy.window_ms,
            }
            return (_signal(record, "noisy", noisy.resource, detail),)
        case TenantQuiet() as quiet:
            return (_signal(record, "quiet", quiet.resource, {"noisy_for_ms": quiet.noisy_for_ms}),)
        case TenantAcknowledged() | TenantForgotten():
            return ()
        case other:
            raise RecordError("misplaced", f"the recorder has no use for {other.event_type}")


def _decision(record: Record, decided: JobDecided) -> JobDecision:
    return JobDecision(
        tenant_id=record.event.tenantid,
        job_id=decided.job_id,
        kind=decided.kind,
        priority=decided.priority,
        decision="admitted" if decided.admitted else "rejected",
        requested_at_ms=decided.requested_at_ms,
        decided_at_ms=decided.decided_at_ms,
        source_version=record.offset,
        reason=decided.reason,
        current_usage=decided.current,
        limit_value=decided.limit,
        retry_after_ms=decided.retry_after_ms,
    )


def _result(record: Record, finished: JobFinished) -> tuple[Effect, ...]:
    tenant = record.event.tenantid
    result = JobResult(
        tenant_id=tenant,
        job_id=finished.job_id,
        outcome=finished.status,
        finished_at_ms=finished.finished_at_ms,
        source_version=record.offset,
        accepted_attempt=finished.attempt or None,
    )
    if not finished.attempt:
        return (result,)  # cancelled before any attempt began
    execution = Execution(
        tenant_id=tenant,
        job_id=finished.job_id,
        attempt=finished.attempt,
        executor=finished.executor,
        status=finished.status,
        source_version=record.offset,
        finished_at_ms=finished.finished_at_ms,
        worker_us=finished.worker_us,
        error=f"{finished.reason}: {finished.detail}" if finished.reason else None,
    )
    return (result, execution)


def _usage(record: Record, usage: TenantUsage) -> tuple[Effect, ...]:
    tenant = record.event.tenantid
    window_seconds = (usage.window_end_ms - usage.window_start_ms) // 1000
    resources = [
        Usage(
            tenant_id=tenant,
            resource=resource,
            window_start_ms=usage.window_start_ms,
            window_seconds=window_seconds,
            quantity=quantity,
            source_version=record.offset,
        )
        for resource, quantity in usage.used.items()
    ]
    quotas = [_quota(tenant, quota, limit, usage, record.offset) for quota, limit in usage.limits.items()]
    return (*resources, *quotas)


def _quota(tenant: TenantId, quota: QuotaType, limit: int, usage: TenantUsage, version: int) -> QuotaUsage:
    monthly = quota is QuotaType.MONTHLY_RECONCILIATIONS
    concurrent = quota is QuotaType.CONCURRENT_JOBS
    if quota is QuotaType.RATE_LIMIT:
        # What is used up is the burst; the rate is how fast it comes back.
        used, limit = usage.rate_tokens_used, usage.rate_burst
    else:
        used = 0 if concurrent else usage.used.get(_RESOURCE_OF_QUOTA[quota], 0)
    return QuotaUsage(
        tenant_id=tenant,
        quota_type=quota,
        used=used,
        reserved=usage.running if concurrent else 0,
        limit_value=limit,
        window_end_ms=usage.window_end_ms if monthly else None,
        source_version=version,
    )


def _signal(record: Record, kind: str, resource: str, detail: dict[str, int | None]) -> Signal:
    return Signal(
        tenant_id=record.event.tenantid,
        signal_id=record.event.id,
        kind=kind,
        resource=resource,
        detail=detail,
        signalled_at_ms=record.event.time_ms,
        source_version=record.offset,
    )


def _flag(record: Record, changed: FlagChanged) -> tuple[Effect, ...]:
    tenant = record.event.tenantid
    definition = {"rollout_per_mille": changed.rollout_per_mille, "salt": changed.salt}
    flag = Flag(
        tenant_id=tenant,
        flag=changed.flag,
        scope=changed.scope,
        enabled=changed.enabled,
        definition=definition,
        changed_by=changed.actor,
        changed_at_ms=changed.changed_at_ms,
        source_version=changed.version,
        user_id=changed.user_id or "",
        killed=changed.killed,
        removed=changed.deleted and not changed.killed,  # a kill stands, whether or not anything was ever set
    )
    audit = AuditEntry(
        tenant_id=tenant,
        id=record.event.id,
        actor=changed.actor,
        action=f"flag.{changed.action}",
        subject=f"{changed.flag}/{changed.scope}",
        recorded_at_ms=changed.changed_at_ms,
        after={**definition, "enabled": changed.enabled, "killed": changed.killed, "reason": changed.reason},
    )
    return (flag, audit)
