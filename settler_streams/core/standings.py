"""Where each tenant of a partition stands: its root, its chain of parents, and the limits that hold at each level.

Worked out from the state at the first question, and remembered until any tenant changes.
"""

from __future__ import annotations

from typing import NamedTuple

from settler_streams.core import quotas
from settler_streams.core.fold import State, value_of
from settler_streams.core.quotas import Level, Limits, Tenant, Usage
from settler_streams.errors import RecordError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId
from settler_streams.tiers import Tiers

CHAIN_DEPTH_MAX = 8
"""Levels from a tenant to its root; the tenant service allows no more."""


class Standing(NamedTuple):
    """One tenant's place. ``members`` is the tenant and its parents up to the root, ``limits`` those of each.

    ``active`` says that all of them are known and active. Of a chain that leads to an unknown tenant, ``limits`` ends
    before it.
    """

    root: TenantId
    members: tuple[TenantId, ...]
    limits: tuple[Limits, ...]
    active: bool


class Standings:
    """The standings of one fold's tenants."""

    def __init__(self, state: State, tiers: Tiers) -> None:
        self._state = state
        self._tiers = tiers
        self._known: dict[TenantId, Standing] = {}

    def of(self, tenant_id: TenantId, key: str) -> Standing | None:
        """The standing of the tenant that a record with ``key`` names; None when nothing is known of it.

        Raises:
            RecordError: ``foreign-tenant``; the key is not the tenant's root. An unknown tenant is its own root.
        """
        standing = self._known.get(tenant_id) or self._find(tenant_id)
        if key != (tenant_id if standing is None else standing.root):
            raise RecordError("foreign-tenant", f"the key {key[:100]!r} is not the root of tenant {tenant_id}")
        return standing

    def forget(self) -> None:
        """A tenant has changed; any chain may lead through it."""
        self._known.clear()

    def limits_of(self, tenant: Tenant) -> Limits:
        """The limits that ``tenant`` has by itself."""
        return Limits.of(tenant, self._tiers)

    def levels(self, standing: Standing, now_ms: int) -> list[Level]:
        """What each level of the chain is allowed and has used.

        Raises:
            RecordError: ``unknown-tenant``; the chain leads to a tenant of which nothing is known.
        """
        if len(standing.limits) < len(standing.members):
            raise RecordError(
                "unknown-tenant", f"tenant {standing.members[len(standing.limits)]} of the chain is not known"
            )
        usage_of = self._state.get
        return [
            Level(member, limits, usage_of("usage/" + member) or quotas.new_usage(limits, now_ms))  # type: ignore[arg-type]
            for member, limits in zip(standing.members, standing.limits, strict=True)
        ]

    def level(self, tenant_id: TenantId, now_ms: int) -> Level | None:
        """The level of ``tenant_id`` alone; None when nothing is known of it."""
        standing = self._known.get(tenant_id) or self._find(tenant_id)
        if standing is None:
            return None
        limits = standing.limits[0]
        usage = value_of(self._state, f"usage/{tenant_id}", Usage)
        return Level(tenant_id, limits, usage or quotas.new_usage(limits, now_ms))

    def _find(self, tenant_id: TenantId) -> Standing | None:
        tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
        if tenant is None:
            return None
        root, members, limits, active = tenant.root_id, [tenant_id], [self.limits_of(tenant)], True
        while True:
            active = active and tenant.status is TenantStatus.ACTIVE
            if tenant.parent_id is None or len(members) == CHAIN_DEPTH_MAX:
                break
            members.append(tenant.parent_id)
            parent = value_of(self._state, f"tenant/{tenant.parent_id}", Tenant)
            if parent is None:
                active = False
                break
            limits.append(self.limits_of(parent))
            tenant = parent
        standing = self._known[tenant_id] = Standing(root, tuple(members), tuple(limits), active)
        return standing
