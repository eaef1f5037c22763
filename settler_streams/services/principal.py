"""Who a request comes from."""

from __future__ import annotations

from dataclasses import dataclass

from settler_streams.events import TenantStatus, TenantTier
from settler_streams.ids import TenantId


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a valid key speaks for."""

    tenant_id: TenantId
    root_id: TenantId
    tier: TenantTier
    status: TenantStatus
    key_id: str
    scopes: frozenset[str]

    @property
    def actor(self) -> str:
        """How audit entries name it."""
        return f"api-key:{self.key_id}"
