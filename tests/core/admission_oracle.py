"""What admission must decide, worked out from the specification with fractions and lists, without its code."""

from __future__ import annotations

import datetime as dt
from fractions import Fraction

from settler_streams.events import QuotaType, RejectReason, Resource, TenantStatus, TenantTier
from settler_streams.tiers import load_tiers

WINDOW_MS = 10 * 60_000
KINDS = {"reconciliation", "reconciliation-preview"}


def month_of(now_ms):
    now = dt.datetime.fromtimestamp(now_ms // 1000, dt.UTC)
    return now.year, now.month


class Account:
    """One tenant: its newest configuration, and what it and its children have used."""

    def __init__(self, changed, now_ms):
        self.config = changed
        self.tokens, self.at_ms = Fraction(self.burst), now_ms
        self.running = self.requests = self.storage = self.domains = 0
        self.months = {}

    @property
    def limits(self):
        return load_tiers()[self.config.tier].limits() | self.config.quotas

    @property
    def burst(self):
        return self.config.burst or min(load_tiers()[self.config.tier].burst, max(1, self.limits[QuotaType.RATE_LIMIT]))

    def settle(self, now_ms):
        earned = Fraction((now_ms - self.at_ms) * self.limits[QuotaType.RATE_LIMIT], 60_000)
        self.tokens, self.at_ms = min(Fraction(self.burst), self.tokens + earned), now_ms

    def change(self, changed, now_ms):
        self.settle(now_ms)
        self.config = changed
        self.tokens = min(self.tokens, Fraction(self.burst))


class Oracle:
    """Answers each input with the reason of refusal, ``None`` for admitted, ``"nothing"``, or ``"dead <reason>"``."""

    def __init__(self, open_jobs_max):
        self.open_jobs_max = open_jobs_max
        self.accounts = {}
        self.seen = []
        self.open = {}
        self.flags = {}

    def chain(self, tenant):
        chain = [tenant]
        while (account := self.accounts.get(chain[-1])) is not None and account.config.parent_id is not None:
            chain.append(account.config.parent_id)
        return chain

    def _forget(self, now_ms):
        self.seen = [entry for entry in self.seen if entry[2] > now_ms - WINDOW_MS]

    def _repeat(self, record, tenant, now_ms):
        account = self.accounts.get(tenant)
        if record.key != (account.config.root_id if account else tenant):
            return "dead foreign-tenant"
        self._forget(now_ms)
        for event_id, whose, _ in self.seen:
            if event_id == record.event.id:
                return "nothing" if whose == (record.event.source, tenant) else "dead id-conflict"
        return None

    def _remember(self, record, now_ms):
        self._forget(now_ms)
        self.seen.append((record.event.id, (record.event.source, record.event.tenantid), now_ms))

    def requested(self, record, now_ms):
        tenant, request = record.event.tenantid, record.event.data
        if (answer := self._repeat(record, tenant, now_ms)) is not None:
            return answer
        if record.event.id in self.open:
            chain, source = self.open[record.event.id]
            return "nothing" if (source, chain[0]) == (record.event.source, tenant) else "dead id-conflict"
        self._remember(record, now_ms)
        if tenant not in self.accounts:
            return RejectReason.UNKNOWN_TENANT
        chain = self.chain(tenant)
        accounts = [self.accounts.get(member) for member in chain]
        if any(a is None or a.config.status is not TenantStatus.ACTIVE for a in accounts):
            return RejectReason.TENANT_SUSPENDED
        if request.kind not in KINDS:
            return RejectReason.UNSUPPORTED_KIND
        if not self.flags.get(f"jobs.{request.kind}", (0, True))[1]:
            return RejectReason.FLAG_DISABLED
        of_root = sum(members[-1] == chain[-1] for members, _ in self.open.values())
        if len(self.open) >= self.open_jobs_max or of_root >= self.open_jobs_max / 2:
            return RejectReason.POOL_FULL
        reason = None if accounts[0].config.tier is TenantTier.ENTERPRISE else self._over(accounts, now_ms)
        if reason is None:
            self.open[record.event.id] = (chain, record.event.source)
            for account in accounts:
                account.running += 1
                account.requests += 1
                account.months[month_of(now_ms)] = account.months.get(month_of(now_ms), 0) + 1
        return reason

    def _over(self, accounts, now_ms):
        for account in accounts:
            if account.running >= account.limits[QuotaType.CONCURRENT_JOBS]:
                return RejectReason.CONCURRENT_JOBS
            if account.months.get(month_of(now_ms), 0) >= account.limits[QuotaType.MONTHLY_RECONCILIATIONS]:
                return RejectReason.MONTHLY_RECONCILIATIONS
        for account in accounts:
            account.settle(now_ms)
        if any(account.tokens < 1 for account in accounts):
            return RejectReason.RATE_LIMIT
        for account in accounts:
            account.tokens -= 1
        return None

    def finished(self, job_id):
        for member in self.open.pop(job_id, ([], ""))[0]:
            self.accounts[member].running -= 1
        return "nothing"

    def used(self, record, now_ms):
        tenant, used = record.event.tenantid, record.event.data
        answer = self._repeat(record, tenant, now_ms)
        if answer == "dead foreign-tenant":
            return answer
        if tenant not in self.accounts:
            return "dead unknown-tenant"
        if answer is not None:
            return answer
        accounts = [self.accounts.get(member) for member in self.chain(tenant)]
        if None in accounts:
            return "dead unknown-tenant"
        names = {Resource.STORAGE_BYTES: "storage", Resource.CUSTOM_DOMAINS: "domains"}
        if (name := names.get(used.resource)) is not None:
            totals, quantity = [], used.quantity
            for account in accounts:
                totals.append(max(0, getattr(account, name) + quantity))
                quantity = totals[-1] - getattr(account, name)
            if max(totals) >= 2**63:
                return "dead out-of-range"
            for account, total in zip(accounts, totals, strict=True):
                setattr(account, name, total)
        self._remember(record, now_ms)
        return "nothing"

    def changed(self, record, now_ms):
        tenant, changed = record.event.tenantid, record.event.data
        if record.key != changed.root_id:
            return "dead foreign-tenant"
        account = self.accounts.get(tenant)
        if account is None:
            self.accounts[tenant] = Account(changed, now_ms)
        elif changed.version > account.config.version:
            account.change(changed, now_ms)
        return "nothing"

    def flag(self, state):
        if state.version > self.flags.get(state.flag, (0, True))[0]:
            self.flags[state.flag] = (state.version, state.enabled and not state.killed)
        return "nothing"

    def tick(self, now_ms):
        self._forget(now_ms)
        return "nothing"
