"""Events about tenants: their configuration, their usage, and the signals raised about them."""

from __future__ import annotations

from pydantic import Field

from settler_streams.events.fields import (
    Count,
    Int64,
    Millis,
    Name,
    PartitionNumber,
    Positive,
    QuotaType,
    Resource,
    TenantStatus,
    TenantTier,
    Text,
    Uuid,
)
from settler_streams.events.structs import Part, event, part


@event("settler.tenant.changed.v1")
class TenantChanged(Part):
    """The whole of what decisions need to know of a tenant, as of ``version`` (one more with every change)."""

    version: Positive
    slug: Text
    tier: TenantTier
    status: TenantStatus
    root_id: Uuid
    parent_id: Uuid | None = None
    quotas: dict[QuotaType, Count] = Field(default={})
    """Overrides of the tier's default limits."""
    burst: Positive | None = None


@event("settler.tenant.acknowledged.v1")
class TenantAcknowledged(Part):
    """Admission decides by this version of the tenant from here on."""

    version: Positive


@event("settler.tenant.erased.v1")
class TenantErased(Part):
    """From here on nothing is kept of the tenant but that it was erased; whatever still comes is refused. Final."""

    version: Positive
    root_id: Uuid


@event("settler.tenant.forgotten.v1")
class TenantForgotten(Part):
    """The fold ``role`` of ``partition`` keeps nothing of the tenant any more, as its erasure of ``version`` asked."""

    version: Positive
    role: Name
    partition: PartitionNumber


@event("settler.usage.recorded.v1")
class UsageRecorded(Part):
    """Something a tenant used, at the envelope's ``time``. A negative ``quantity`` gives storage or domains back."""

    resource: Resource
    quantity: Int64


@event("settler.tenant.usage.v1")
class TenantUsage(Part):
    """A tenant's metered usage as of ``as_of_ms``; a newer one replaces an older one, nothing is added up."""

    as_of_ms: Millis
    window_start_ms: Millis
    window_end_ms: Millis
    used: dict[Resource, Int64]
    running: Count
    limits: dict[QuotaType, Count]
    rate_tokens_used: Count = 0
    rate_burst: Count = 0


@event("settler.quota.threshold.v1")
class QuotaThreshold(Part):
    """A tenant's use of a quota reached 80, 90 or 100 per cent; sent once per threshold and window."""

    quota: QuotaType
    percent: Positive
    used: Count
    limit: Count
    window_start_ms: Millis


@part
class TenantSums(Part):
    """One tenant's sums of one window."""

    tenant: Uuid
    root: Uuid
    requests: Count = 0
    worker_us: Count = 0
    storage_bytes: Count = 0


@event("settler.usage.partial.v1")
class UsagePartial(Part):
    """One partition's sums of one window, whole, in chunks; a greater ``revision`` of a chunk replaces a lesser."""

    partition: PartitionNumber
    window_start_ms: Millis
    window_ms: Positive
    revision: Count
    chunk: Count = 0
    sums: tuple[TenantSums, ...]


@event("settler.tenant.noisy.v1")
class TenantNoisy(Part):
    """The tenant uses more than three times the average of the others."""

    resource: Name
    window_start_ms: Millis
    window_ms: Positive
    used: Count
    others_average: Count
    ratio_per_mille: Count | None = None
    tenants: Count


@event("settler.tenant.quiet.v1")
class TenantQuiet(Part):
    """The tenant is back within its share."""

    resource: Name
    window_start_ms: Millis
    noisy_for_ms: Millis = 0
