"""Where each tenant of a partition stands: its root, its chain of parents, and what each level allows and has used.

A tenant's :class:`~settler_streams.core.quotas.Level` is read from the state once and then kept here; what a step has
changed of it is stored together, by :meth:`Standings.settle`.
"""

from __future__ import annotations

from typing import NamedTuple

from settler_streams.core import quotas
from settler_streams.core.fold import State, Value, value_of
from settler_streams.core.quotas import Level, Limits, Tenant, Usage
from settler_streams.errors import RecordError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId
from settler_streams.tiers import Tiers

CHAIN_DEPTH_MAX = 8
"""Levels from a tenant to its root; the tenant service allows no more, and no circles."""


class Standing(NamedTuple):
    """One tenant's place.

    ``members`` is the tenant and its parents up to the root, and ``levels`` what each is allowed and has used.
    ``active`` says that all of them are known and active. Of a chain that leads to an unknown tenant, ``levels`` ends
    before it.
    """

    root: TenantId
    members: tuple[TenantId, ...]
    levels: tuple[Level, ...]
    active: bool


class Standings:
    """The standings of one fold's tenants."""

    def __init__(self, state: State, tiers: Tiers, reports: int) -> None:
        self._state = state
        self._tiers = tiers
        self._known: dict[TenantId, Standing] = {}
        self._levels: dict[TenantId, Level] = {}
        self._touched: dict[TenantId, Level] = {}
        self.changed = {
            TenantId(key[len("usage/") :])
            for key, usage in state.items()
            if isinstance(usage, Usage) and usage.changed_in == reports
        }
        """Tenants whose usage the round ``reports`` of usage reports has to tell."""

    def of(self, tenant_id: TenantId, key: str, now_ms: int) -> Standing | None:
        """The standing of the tenant that a record with ``key`` names; None when nothing is known of it.

        Raises:
            RecordError: ``foreign-tenant``; the key is not the tenant's root. An unknown tenant is its own root.
        """
        standing = self._known.get(tenant_id) or self._find(tenant_id, now_ms)
        if key != (tenant_id if standing is None else standing.root):
            raise RecordError("foreign-tenant", f"the key {key[:100]!r} is not the root of tenant {tenant_id}")
        return standing

    def level(self, tenant_id: TenantId, now_ms: int) -> Level | None:
        """What ``tenant_id`` by itself is allowed and has used; None when nothing is known of it."""
        level = self._levels.get(tenant_id)
        if level is None:
            tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
            if tenant is None:
                return None
            limits = self.limits_of(tenant)
            usage = value_of(self._state, f"usage/{tenant_id}", Usage) or quotas.new_usage(limits, now_ms)
            level = self._levels[tenant_id] = Level(tenant_id, limits, usage)
        return level

    def limits_of(self, tenant: Tenant) -> Limits:
        """The limits that ``tenant`` has by itself."""
        return Limits.of(tenant, self._tiers)

    def put(self, level: Level, usage: Usage) -> None:
        """This has been used; it is stored when the step settles."""
        level.usage = usage
        self.changed.add(level.tenant_id)
        self._touched[level.tenant_id] = level

    def change(self, tenant_id: TenantId, limits: Limits, usage: Usage) -> None:
        """The tenant is new or has changed. Any chain may lead through it."""
        level = self._levels.setdefault(tenant_id, Level(tenant_id, limits, usage))
        level.limits = limits
        self.put(level, usage)
        self._known.clear()

    def forget(self, tenant_id: TenantId) -> None:
        """The tenant is no more; its keys are for the caller to delete. Any chain may have led through it."""
        self._levels.pop(tenant_id, None)
        self._touched.pop(tenant_id, None)
        self.changed.discard(tenant_id)
        self._known.clear()

    def settle(self) -> dict[str, Value | None]:
        """The changes that store what was used since the last call."""
        touched, self._touched = self._touched, {}
        return {f"usage/{tenant_id}": level.usage for tenant_id, level in touched.items()}

    def _find(self, tenant_id: TenantId, now_ms: int) -> Standing | None:
        tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
        level = self.level(tenant_id, now_ms)
        if tenant is None or level is None:
            return None
        root, members, levels = tenant.root_id, [tenant_id], [level]
        active = tenant.status is TenantStatus.ACTIVE
        while tenant.parent_id is not None and tenant.parent_id not in members and len(members) < CHAIN_DEPTH_MAX:
            members.append(tenant.parent_id)
            parent = value_of(self._state, f"tenant/{tenant.parent_id}", Tenant)
            level = self.level(tenant.parent_id, now_ms)
            if parent is None or level is None:
                active = False
                break
            active = active and parent.status is TenantStatus.ACTIVE
            levels.append(level)
            tenant = parent
        standing = self._known[tenant_id] = Standing(root, tuple(members), tuple(levels), active)
        return standing


def require_whole(standing: Standing) -> None:
    """What is used counts at every level, so every level has to be known.

    Raises:
        RecordError: ``unknown-tenant``; the chain leads to a tenant of which nothing is known.
    """
    if len(standing.levels) < len(standing.members):
        missing = standing.members[len(standing.levels)]
        raise RecordError("unknown-tenant", f"tenant {missing} of the chain is not known")
