"""Accounts: what a tenant may use and has used, as decisions go on.

A tenant draws on its own account and on those of every parent up to its root: a request passes only if it passes at
every level, and is then charged at every level. Enterprise tenants bypass the limits and are metered all the same.

An account changes in place, since every request charges one; :meth:`Account.usage` is its stored form. Whatever can be
refused is refused before anything is charged.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from settler_streams.core.quotas import Limits, Refusal, Usage
from settler_streams.core.token_bucket import UNITS_PER_TOKEN, Bucket, change_policy, take_all
from settler_streams.errors import RecordError
from settler_streams.events import QuotaThreshold, QuotaType, RejectReason, Resource
from settler_streams.ids import TenantId

THRESHOLDS_PERCENT = (80, 90, 100)
"""A signal is sent when use reaches each of these, once per window."""
COUNT_MAX = 2**63 - 1
"""What a count in an event can hold."""
_MONTHLY = QuotaType.MONTHLY_RECONCILIATIONS


class Account(msgspec.Struct, gc=False):
    """One level of a tenant's chain (the tenant itself, a parent, the root). The fields up to ``changed_in`` are those
    of :class:`Usage`, the bucket's two among them.

    ``touched`` is for whoever stores accounts. The last three are the bounds of :meth:`is_quiet`; 0 knows nothing.
    """

    tenant_id: TenantId
    limits: Limits
    units: int
    updated_ms: int
    running: int
    month_start_ms: int
    month_jobs: int
    storage_bytes: int
    domains: int
    requests: int
    signalled: dict[QuotaType, int]
    changed_in: int
    touched: bool = False
    quiet_from: int = 0
    quiet_below: int = 0
    month_quiet_below: int = 0

    @classmethod
    def of(cls, tenant_id: TenantId, limits: Limits, usage: Usage) -> Account:
        """The account of a tenant that has used this."""
        return cls(
            tenant_id=tenant_id,
            limits=limits,
            units=usage.bucket.level,
            updated_ms=usage.bucket.updated_ms,
            running=usage.running,
            month_start_ms=usage.month_start_ms,
            month_jobs=usage.month_jobs,
            storage_bytes=usage.storage_bytes,
            domains=usage.domains,
            requests=usage.requests,
            signalled=usage.signalled,
            changed_in=usage.changed_in,
        )

    def usage(self) -> Usage:
        """What is stored of it."""
        return Usage(
            Bucket(self.units, self.updated_ms),
            self.running,
            self.month_start_ms,
            self.month_jobs,
            self.storage_bytes,
            self.domains,
            self.requests,
            self.signalled,
            self.changed_in,
        )

    def change_limits(self, limits: Limits, now_ms: int) -> None:
        """From ``now_ms`` on these limits hold; which thresholds are reached by them is seen at the next charge."""
        bucket = change_policy(Bucket(self.units, self.updated_ms), self.limits.rate, limits.rate, now_ms)
        self.units, self.updated_ms = bucket.level, bucket.updated_ms
        self.limits = limits
        self.quiet_below = self.month_quiet_below = 0

    def tokens_left(self, now_ms: int) -> int:
        """Whole tokens in the rate limit's bucket at ``now_ms``."""
        rate = self.limits.rate
        return change_policy(Bucket(self.units, self.updated_ms), rate, rate, now_ms).level // UNITS_PER_TOKEN

    def used_of(self, quota: QuotaType) -> int:
        """How much of ``quota`` is in use; for the rate limit see the bucket."""
        return {
            QuotaType.CONCURRENT_JOBS: self.running,
            QuotaType.MONTHLY_RECONCILIATIONS: self.month_jobs,
            QuotaType.STORAGE: self.storage_bytes,
            QuotaType.CUSTOM_DOMAINS: self.domains,
        }.get(quota, 0)

    def jobs_in(self, month_start_ms: int) -> int:
        """Jobs admitted in the month that begins then, of which it is the present one."""
        return self.month_jobs if self.month_start_ms == month_start_ms else 0

    def begin_month(self, month_start_ms: int) -> None:
        """Begin a new month's count; a closed month is never rewritten."""
        self.month_start_ms, self.month_jobs, self.month_quiet_below = month_start_ms, 0, 0
        if _MONTHLY in self.signalled:
            self.signalled = {quota: percent for quota, percent in self.signalled.items() if quota is not _MONTHLY}

    def release(self) -> None:
        """A job of this level has finished.

        Raises:
            ValueError: more jobs would end than were admitted; a reservation ends exactly once.
        """
        if self.running < 1:
            raise ValueError("a job finished that holds no reservation")
        self.running -= 1

    def is_quiet(self) -> bool:
        """Whether :meth:`crossed_thresholds` has nothing to say, by what it has found out when it was last asked.

        Whatever else changes than the number of jobs, it is asked at once or a bound is taken back.
        """
        return self.quiet_from <= self.running < self.quiet_below and self.month_jobs < self.month_quiet_below

    def crossed_thresholds(self) -> list[QuotaThreshold]:
        """The thresholds newly reached, each told once; one is armed again when use has fallen below the lowest."""
        reached: list[QuotaThreshold] = []
        for quota, limit in self.limits.by_quota.items():
            if quota is QuotaType.RATE_LIMIT or limit == 0:
                continue
            percent = self.used_of(quota) * 100 // limit
            before = self.signalled.get(quota, 0)
            highest = max((t for t in THRESHOLDS_PERCENT if percent >= t), default=0)
            if highest > before:
                reached += [self._threshold(quota, t) for t in THRESHOLDS_PERCENT if before < t <= highest]
                self.signalled = self.signalled | {quota: highest}
            elif highest == 0 and before:
                self.signalled = {q: t for q, t in self.signalled.items() if q is not quota}
        self.quiet_from, self.quiet_below = self._quiet(QuotaType.CONCURRENT_JOBS, self.limits.concurrent)
        self.month_quiet_below = self._quiet(_MONTHLY, self.limits.monthly)[1]
        return reached

    def _threshold(self, quota: QuotaType, percent: int) -> QuotaThreshold:
        return QuotaThreshold(
            quota=quota,
            percent=percent,
            used=self.used_of(quota),
            limit=self.limits.by_quota[quota],
            window_start_ms=self.month_start_ms if quota is _MONTHLY else 0,
        )

    def _quiet(self, quota: QuotaType, limit: int) -> tuple[int, int]:
        """From and up to (and without) which use the present signal of ``quota`` stands; a limit of 0 has none."""
        if limit == 0:
            return 0, COUNT_MAX
        signalled = self.signalled.get(quota, 0)
        least = [-(-limit * percent // 100) for percent in THRESHOLDS_PERCENT]
        above = [use for use, percent in zip(least, THRESHOLDS_PERCENT, strict=True) if percent > signalled]
        return least[0] if signalled else 0, above[0] if above else COUNT_MAX


def admit(accounts: Sequence[Account], month: tuple[int, int], now_ms: int) -> Refusal | None:
    """Charge one more job to each account, or say why there can be none: a denial changes nothing at all.

    ``month`` is the calendar month of ``now_ms``.
    """
    month_start_ms = month[0]
    if not accounts[0].limits.enterprise:
        left: list[int] = []
        for account in accounts:
            limits, units = account.limits, account.units
            if now_ms > account.updated_ms:
                units += (now_ms - account.updated_ms) * limits.refill_per_ms
            if units > limits.capacity:
                units = limits.capacity
            if (
                units < UNITS_PER_TOKEN
                or account.running >= limits.concurrent
                or (account.month_jobs >= limits.monthly and account.jobs_in(month_start_ms) >= limits.monthly)
            ):  # the month's count is of an earlier month now and then, so the first look at it is not the last
                return _refusal(accounts, month, now_ms)
            left.append(units - UNITS_PER_TOKEN)
        for account, units in zip(accounts, left, strict=True):
            account.units = units
            if now_ms > account.updated_ms:
                account.updated_ms = now_ms
    for account in accounts:
        if account.month_start_ms != month_start_ms:
            account.begin_month(month_start_ms)
        account.running += 1
        account.month_jobs += 1
        account.requests += 1
    return None


def _refusal(accounts: Sequence[Account], month: tuple[int, int], now_ms: int) -> Refusal:
    """Why there can be no further job: the rate, which only needs patience, is named when nothing else refuses."""
    for account in accounts:
        limit = account.limits.concurrent
        if account.running >= limit:
            return Refusal(RejectReason.CONCURRENT_JOBS, QuotaType.CONCURRENT_JOBS, account.running, limit, None)
        limit, month_jobs = account.limits.monthly, account.jobs_in(month[0])
        if month_jobs >= limit:
            wait_ms = max(0, month[1] - now_ms)
            return Refusal(RejectReason.MONTHLY_RECONCILIATIONS, _MONTHLY, month_jobs, limit, wait_ms)
    buckets = [Bucket(account.units, account.updated_ms) for account in accounts]
    policies = [account.limits.rate for account in accounts]
    verdict = take_all(buckets, policies, 1, now_ms)[1]
    policy = policies[verdict.denied_by]  # of who holds the request back longest
    return Refusal(
        RejectReason.RATE_LIMIT,
        QuotaType.RATE_LIMIT,
        policy.burst - verdict.remaining,
        policy.rate_per_minute,
        verdict.retry_after_ms,
    )


def record(accounts: Sequence[Account], resource: Resource, quantity: int) -> bool:
    """Storage or domains that the first account's tenant takes (positive) or gives back, at each level.

    Each level changes by as much as the one below it. So whoever gives back more than there is takes nothing from what
    others hold under the same parent.

    Returns:
        False for any other resource, of which no account is kept.

    Raises:
        RecordError: ``out-of-range``; a sum needs more than 64 bits. Nothing has changed.
    """
    if resource is Resource.STORAGE_BYTES:
        totals = _totals([account.storage_bytes for account in accounts], quantity)
        for account, total in zip(accounts, totals, strict=True):
            account.storage_bytes = total
    elif resource is Resource.CUSTOM_DOMAINS:
        totals = _totals([account.domains for account in accounts], quantity)
        for account, total in zip(accounts, totals, strict=True):
            account.domains = total
    else:
        return False
    return True


def _totals(used: Sequence[int], quantity: int) -> list[int]:
    totals: list[int] = []
    for count in used:
        total = max(0, count + quantity)
        if total > COUNT_MAX:
            raise RecordError("out-of-range", f"{count} and {quantity} more are beyond 64 bits")
        totals.append(total)
        quantity = total - count
    return totals


def give_back(accounts: Sequence[Account]) -> None:
    """The first account's tenant is no more: each parent is given back what the one below it is.

    That is storage and domains; the month is spent.
    """
    storage_bytes, domains = accounts[0].storage_bytes, accounts[0].domains
    for account in accounts[1:]:
        storage_bytes, domains = min(storage_bytes, account.storage_bytes), min(domains, account.domains)
        account.storage_bytes -= storage_bytes
        account.domains -= domains
        account.quiet_below = 0  # it may have fallen below a threshold; the next charge sees
