"""The field types that event bodies are made of; each carries its constraint and its unit."""

from __future__ import annotations

import enum
from typing import Annotated

from pydantic import Field

from settler_streams.events.structs import I64_MAX, I64_MIN, NO_NUL

Int64 = Annotated[int, Field(ge=I64_MIN, le=I64_MAX)]
Count = Annotated[int, Field(ge=0, le=I64_MAX)]
Positive = Annotated[int, Field(ge=1, le=I64_MAX)]
Millis = Annotated[int, Field(ge=0, le=I64_MAX)]
"""Milliseconds since the Unix epoch, or a duration where the name ends in ``after_ms`` or ``for_ms``."""
Micros = Annotated[int, Field(ge=0, le=I64_MAX)]
PerMille = Annotated[int, Field(ge=0, le=1000)]
PartitionNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]

Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]
"""A UUID in canonical lower-case form, so that equal ids are equal strings."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9._-]{0,99}$")]
"""A machine-readable name: a job kind, a flag, a resource, a reason."""
Text = Annotated[str, Field(max_length=1000, pattern=NO_NUL)]
"""Free text for people."""
LongText = Annotated[str, Field(max_length=10_000, pattern=NO_NUL)]
Cell = Annotated[str, Field(max_length=4000, pattern=NO_NUL)]
"""One value of an inlined row."""


class TenantTier(enum.StrEnum):
    """The five tiers of the specification."""

    FREE = "free"
    STARTER = "starter"
    GROWTH = "growth"
    SCALE = "scale"
    ENTERPRISE = "enterprise"


class TenantStatus(enum.StrEnum):
    """Only an active tenant's requests are admitted."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    DELETED = "deleted"


class QueuePriority(enum.StrEnum):
    """Order among one tenant's own jobs; it never changes anything between tenants."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    CRITICAL = "critical"


class QuotaType(enum.StrEnum):
    """The five quotas of the specification."""

    RATE_LIMIT = "rate_limit"
    STORAGE = "storage"
    CONCURRENT_JOBS = "concurrent_jobs"
    MONTHLY_RECONCILIATIONS = "monthly_reconciliations"
    CUSTOM_DOMAINS = "custom_domains"


class JobStatus(enum.StrEnum):
    """How a job, or one attempt at it, ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RejectReason(enum.StrEnum):
    """Why admission refused a request."""

    UNKNOWN_TENANT = "unknown_tenant"
    TENANT_SUSPENDED = "tenant_suspended"
    FLAG_DISABLED = "flag_disabled"
    RATE_LIMIT = "rate_limit"
    CONCURRENT_JOBS = "concurrent_jobs"
    MONTHLY_RECONCILIATIONS = "monthly_reconciliations"
    POOL_FULL = "pool_full"
    UNSUPPORTED_KIND = "unsupported_kind"


class FlagScope(enum.StrEnum):
    """Whom a flag setting is for; the narrower scope wins."""

    USER = "user"
    TENANT = "tenant"
    GLOBAL = "global"


class FlagAction(enum.StrEnum):
    """What a command does to one flag in one scope."""

    SET = "set"
    KILL = "kill"
    REVIVE = "revive"
    DELETE = "delete"


class Resource(enum.StrEnum):
    """What is metered per tenant."""

    REQUESTS = "requests"
    WORKER_US = "worker_us"
    STORAGE_BYTES = "storage_bytes"
    CUSTOM_DOMAINS = "custom_domains"
    RECONCILIATIONS = "reconciliations"
