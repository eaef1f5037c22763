"""What projections write: one type per kind of row, as the functions of ``0008_projection.sql`` read them.

Times are Unix milliseconds. ``source_version`` orders the states of one row: the greatest wins, whatever the order of
arrival. For an event it is the offset of its record, since a tenant's events of one topic share a partition; of one
that was redriven, the offset that it had at first.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import msgspec

from settler_streams.ids import TenantId


class JobDecision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The decision columns of a row of ``jobs``; ``decision`` is admitted or rejected."""

    KIND: ClassVar[str] = "job_decision"

    tenant_id: TenantId
    job_id: str
    kind: str
    priority: str
    decision: str
    requested_at_ms: int
    decided_at_ms: int
    source_version: int
    reason: str | None = None
    current_usage: int | None = None
    limit_value: int | None = None
    retry_after_ms: int | None = None


class JobResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result columns of a row of ``jobs``; ``outcome`` is succeeded, failed, cancelled or expired."""

    KIND: ClassVar[str] = "job_result"

    tenant_id: TenantId
    job_id: str
    outcome: str
    finished_at_ms: int
    source_version: int
    accepted_attempt: int | None = None


class Execution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt at a job; ``status`` is running or an outcome, ``worker_us`` the microseconds it worked."""

    KIND: ClassVar[str] = "execution"

    tenant_id: TenantId
    job_id: str
    attempt: int
    executor: str
    status: str
    source_version: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    worker_us: int | None = None
    error: str | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole quantity of a resource in one window, not an increment."""

    KIND: ClassVar[str] = "usage"

    tenant_id: TenantId
    resource: str
    window_start_ms: int
    window_seconds: int
    quantity: int
    source_version: int


class QuotaUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How much of a quota is used and reserved; no ``limit_value``: unlimited, no ``window_end_ms``: never renewed."""

    KIND: ClassVar[str] = "quota_usage"

    tenant_id: TenantId
    quota_type: str
    used: int
    reserved: int
    source_version: int
    limit_value: int | None = None
    window_end_ms: int | None = None


class Signal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A verdict about the tenant (``kind``: noisy, quiet, quota-threshold); ``detail`` names no other tenant."""

    KIND: ClassVar[str] = "signal"

    tenant_id: TenantId
    signal_id: str
    kind: str
    resource: str
    detail: dict[str, Any]
    signalled_at_ms: int
    source_version: int


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a flag in one scope: global under the nil tenant, user with a ``user_id``, else tenant."""

    KIND: ClassVar[str] = "flag"

    tenant_id: TenantId
    flag: str
    scope: str
    enabled: bool
    definition: dict[str, Any]
    changed_by: str
    changed_at_ms: int
    source_version: int
    user_id: str = ""
    killed: bool = False
    removed: bool = False


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who did what to which subject; ``id`` is that of the event or request, so a repetition writes nothing."""

    KIND: ClassVar[str] = "audit_entry"

    tenant_id: TenantId
    id: str
    actor: str
    action: str
    subject: str
    recorded_at_ms: int
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    request_id: str | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dead letter lies, where its record came from, and why it was refused. Written once, never changed."""

    KIND: ClassVar[str] = "dead_letter"

    tenant_id: TenantId
    letter_partition: int
    letter_offset: int
    role: str
    reason: str
    detail: str
    origin_topic: str
    origin_partition: int
    origin_offset: int
    attempts: int
    refused_at_ms: int


class WebhookEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that the tenant's webhooks may want; ``body`` is the record's value. See ``0011_webhooks.sql``."""

    KIND: ClassVar[str] = "webhook_event"

    tenant_id: TenantId
    event_id: str
    event_type: str
    body: str
    appended_at_ms: int
    source_version: int


Effect: TypeAlias = (
    JobDecision | JobResult | Execution | Usage | QuotaUsage | Signal | Flag | AuditEntry | DeadLetter | WebhookEvent
)
