"""Where each tenant of a partition stands: its root, its chain of parents, and what each level allows and has used.

A tenant's :class:`~settler_streams.core.accounts.Account` is read from the state once and then kept here; what a step
has changed of it is stored together, by :meth:`Standings.settle`.
"""

from __future__ import annotations

from typing import NamedTuple

from settler_streams.core import quotas
from settler_streams.core.accounts import Account
from settler_streams.core.fold import State, Value, value_of
from settler_streams.core.quotas import Limits, Reports, Tenant, Usage
from settler_streams.errors import RecordError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId
from settler_streams.tiers import Tiers

CHAIN_DEPTH_MAX = 8
"""Levels from a tenant to its root; the tenant service allows no more, and no circles."""


class Standing(NamedTuple):
    """One tenant's place.

    ``members`` is the tenant and its parents up to the root, and ``accounts`` what each is allowed and has used.
    ``active`` says that all of them are known and active. Of a chain that leads to an unknown tenant, ``accounts`` ends
    before it.
    """

    root: TenantId
    members: tuple[TenantId, ...]
    accounts: tuple[Account, ...]
    active: bool


class Standings:
    """The standings of one fold's tenants."""

    def __init__(self, state: State, tiers: Tiers) -> None:
        reports = value_of(state, "reports/", Reports)
        self.round = reports.rounds if reports else 0
        """The number of the present round of usage reports."""
        self._state = state
        self._tiers = tiers
        self._known: dict[TenantId, Standing] = {}
        self._accounts: dict[TenantId, Account] = {}
        self._touched: dict[TenantId, Account] = {}
        self.changed = {
            TenantId(key[len("usage/") :])
            for key, usage in state.items()
            if isinstance(usage, Usage) and usage.changed_in == self.round
        }
        """Tenants whose usage the present round of reports has to tell."""

    def of(self, tenant_id: TenantId, key: str, now_ms: int) -> Standing | None:
        """The standing of the tenant that a record with ``key`` names; None when nothing is known of it.

        Raises:
            RecordError: ``foreign-tenant``; the key is not the tenant's root. An unknown tenant is its own root.
        """
        standing = self._known.get(tenant_id) or self._find(tenant_id, now_ms)
        if key != (tenant_id if standing is None else standing.root):
            raise RecordError("foreign-tenant", f"the key {key[:100]!r} is not the root of tenant {tenant_id}")
        return standing

    def account(self, tenant_id: TenantId, now_ms: int) -> Account | None:
        """What ``tenant_id`` by itself is allowed and has used; None when nothing is known of it."""
        account = self._accounts.get(tenant_id)
        if account is None:
            tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
            if tenant is None:
                return None
            limits = self.limits_of(tenant)
            usage = value_of(self._state, f"usage/{tenant_id}", Usage) or quotas.new_usage(limits, now_ms)
            account = self._accounts[tenant_id] = Account.of(tenant_id, limits, usage)
        return account

    def limits_of(self, tenant: Tenant) -> Limits:
        """The limits that ``tenant`` has by itself."""
        return Limits.of(tenant, self._tiers)

    def touch(self, account: Account) -> None:
        """The account has changed: it is stored when the step settles, and told by the present round of reports."""
        account.touched = True
        account.changed_in = self.round
        self.changed.add(account.tenant_id)
        self._touched[account.tenant_id] = account

    def change(self, tenant_id: TenantId, limits: Limits, now_ms: int) -> None:
        """The tenant is new or has changed. Any chain may lead through it."""
        account = self.account(tenant_id, now_ms)
        if account is None:
            account = Account.of(tenant_id, limits, quotas.new_usage(limits, now_ms))
            self._accounts[tenant_id] = account
        else:
            account.change_limits(limits, now_ms)
        self.touch(account)
        self._known.clear()

    def forget(self, tenant_id: TenantId) -> None:
        """The tenant is no more; its keys are for the caller to delete. Any chain may have led through it."""
        self._accounts.pop(tenant_id, None)
        self._touched.pop(tenant_id, None)
        self.changed.discard(tenant_id)
        self._known.clear()

    def next_round(self) -> Reports:
        """All that has changed was told; what changes from now on is told by the next round."""
        self.changed.clear()
        self.round += 1
        for account in self._touched.values():
            account.touched = False
        return Reports(self.round)

    def settle(self) -> dict[str, Value | None]:
        """The changes that store what was used since the last call."""
        touched, self._touched = self._touched, {}
        for account in touched.values():
            account.touched = False
        return {f"usage/{tenant_id}": account.usage() for tenant_id, account in touched.items()}

    def _find(self, tenant_id: TenantId, now_ms: int) -> Standing | None:
        tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
        account = self.account(tenant_id, now_ms)
        if tenant is None or account is None:
            return None
        root, members, accounts = tenant.root_id, [tenant_id], [account]
        active = tenant.status is TenantStatus.ACTIVE
        while tenant.parent_id is not None and tenant.parent_id not in members and len(members) < CHAIN_DEPTH_MAX:
            members.append(tenant.parent_id)
            parent = value_of(self._state, f"tenant/{tenant.parent_id}", Tenant)
            account = self.account(tenant.parent_id, now_ms)
            if parent is None or account is None:
                active = False
                break
            active = active and parent.status is TenantStatus.ACTIVE
            accounts.append(account)
            tenant = parent
        standing = self._known[tenant_id] = Standing(root, tuple(members), tuple(accounts), active)
        return standing


def require_whole(standing: Standing) -> None:
    """What is used counts at every level, so every level has to be known.

    Raises:
        RecordError: ``unknown-tenant``; the chain leads to a tenant of which nothing is known.
    """
    if len(standing.accounts) < len(standing.members):
        missing = standing.members[len(standing.accounts)]
        raise RecordError("unknown-tenant", f"tenant {missing} of the chain is not known")
