"""Admission: every job request gets exactly one decision, and an admitted job exactly one place in its pool.

One instance holds one partition's tenants. Its state, by key prefix:

=======  ==========================================================================================================
tenant   what is known of a tenant (from ``tenant-changes``)
usage    what a tenant and its children have used: bucket, running jobs, this month's count, storage, domains
jobs     admitted, unfinished jobs, a few together; see :mod:`settler_streams.core.open_jobs`. ``job`` is one by itself
seen     ids of requests and usage events already handled, together; see :mod:`settler_streams.core.dedup`
flag     flag settings that gate job kinds, known ones or a later release's
reports  the number of the present round of usage reports
erased   a tenant that was erased: nothing else is kept of it, and its requests are refused
=======  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from settler_streams.core import quotas
from settler_streams.core.accounts import Account, admit, give_back
from settler_streams.core.accounts import record as record_use
from settler_streams.core.dedup import SeenIds, SeenWindow
from settler_streams.core.erasure import Erased, erased_tenants, passed_on
from settler_streams.core.flags import FlagSetting, FlagTable, setting_key, setting_of
from settler_streams.core.fold import NOTHING, Emit, FoldClock, FoldLogic, Outcome, Record, State, Value, value_of
from settler_streams.core.job_requests import admission_of, check_paths, refusal_of
from settler_streams.core.open_jobs import OpenJobs, Reservation, Reservations
from settler_streams.core.places import Places
from settler_streams.core.quotas import Limits, Refusal, Reports, Tenant, Usage
from settler_streams.core.standings import Standing, Standings, require_whole
from settler_streams.errors import RecordError
from settler_streams.events import (
    ClockTick,
    FlagState,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobRequested,
    PoolCancelRequested,
    RejectReason,
    Resource,
    TenantAcknowledged,
    TenantChanged,
    TenantErased,
    TenantUsage,
    TenantWeighted,
    UsageRecorded,
)
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.tiers import Tiers

GATING = "jobs."
"""How the names of flags that switch kinds of jobs off begin; of other flags nothing is kept."""
FLAG_OF = {kind: f"{GATING}{kind}" for kind in ("reconciliation", "reconciliation-preview")}
"""What executors can run, and the flag that switches a kind off."""
_NO_CHANGES: Mapping[str, Value | None] = {}


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """What every partition's admission knows: the tiers, and how many jobs of this partition may be open at once."""

    tiers: Tiers
    open_jobs_max: int
    pools: int


class Admission(FoldLogic):
    """The admission fold of one partition."""

    kinds: ClassVar[dict[str, type[Value]]] = {
        "clock": FoldClock,
        "tenant": Tenant,
        "usage": Usage,
        "jobs": Reservations,
        "job": Reservation,
        "seen": SeenIds,
        "flag": FlagSetting,
        "reports": Reports,
        "erased": Erased,
    }

    def __init__(self, state: State, policy: AdmissionPolicy) -> None:
        self._state = state
        self._policy = policy
        self._flags = FlagTable(v for v in state.values() if isinstance(v, FlagSetting))
        self._jobs = OpenJobs(state)
        self._seen = SeenWindow(state)
        self._places = Places(policy.pools)
        self._standings = Standings(state, policy.tiers)
        self._month = (0, 0)
        self._now_ms = -1
        self._erased = erased_tenants(state)

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Decide on one record; see :class:`~settler_streams.core.fold.FoldLogic`."""
        if now_ms != self._now_ms:
            self._seen.forget(now_ms)  # by every record, so that the state follows from those that were folded
            self._now_ms = now_ms
        data = record.event.data
        if self._erased and record.event.tenantid in self._erased:
            return self._late(record, now_ms)
        if type(data) is JobRequested:  # nearly all
            return self._requested(record, data, now_ms)
        match data:
            case JobFinished() as finished:
                return self._finished(finished, now_ms)
            case UsageRecorded() as used:
                return self._used(record, used, now_ms)
            case TenantChanged() as changed:
                return self._tenant_changed(record, changed, now_ms)
            case TenantErased() as erased:
                return self._erase(record, erased, now_ms)
            case FlagState() as flag:
                return self._flag_changed(record, flag)
            case JobCancelRequested() as cancel:
                return self._cancel_requested(record, cancel)
            case ClockTick():
                return self._tick(now_ms)
            case other:
                raise RecordError("misplaced", f"admission has no use for {other.event_type} in {record.topic}")

    def _requested(self, record: Record, request: JobRequested, now_ms: int) -> Outcome:
        """Admit or refuse."""
        event, key = record.event, record.key
        tenant_id, job_id = event.tenantid, event.id
        check_paths(request)
        standing = self._standings.of(tenant_id, key, now_ms)
        if job_id in self._jobs.by_id:
            self._check_owner(record)
            return NOTHING  # the job is under way: a repeat, however long its id has been forgotten
        if not self._seen.take(record, now_ms):
            return NOTHING
        refusal: RejectReason | Refusal | None = self._gate(standing, request)
        if standing is not None and refusal is None:
            refusal = admit(standing.accounts, self._month_of(now_ms), now_ms)
        if standing is None or refusal is not None:
            refused = refusal_of(record, request, refusal or RejectReason.UNKNOWN_TENANT, now_ms)
            return Outcome(_NO_CHANGES, (_decision(refused, tenant_id, key),))
        self._jobs.add(record, standing.members)
        admitted = admission_of(record, request, now_ms)
        decided = _decision(admitted, tenant_id, key)
        full = self._places.add(record, request, now_ms)
        signals = self._charged(standing.accounts, key)
        return Outcome(_NO_CHANGES, (decided, *full, *signals) if full or signals else (decided,))

    def settle(self) -> Outcome:
        """What a step has used, the jobs it has admitted and seen end, and the ids it has remembered."""
        changes = {**self._standings.settle(), **self._jobs.settle(), **self._seen.settle()}
        return Outcome(changes, self._places.take_all())

    def _check_owner(self, record: Record) -> None:
        """The open job of this request's id has to be the same one.

        Raises:
            RecordError: ``id-conflict``; the job is another source's or tenant's.
        """
        known = self._jobs.by_id[record.event.id]
        if (known.source, known.tenant) != (record.event.source, record.event.tenantid):
            owner = f"{known.source!r} for {known.tenant}"
            raise RecordError("id-conflict", f"the open job {record.event.id} came from {owner}")

    def _gate(self, standing: Standing | None, request: JobRequested) -> RejectReason | None:
        """The reasons to refuse that have nothing to do with how much was used."""
        if standing is None:
            return RejectReason.UNKNOWN_TENANT
        if not standing.active:
            return RejectReason.TENANT_SUSPENDED
        flag = FLAG_OF.get(request.kind)
        if flag is None:
            return RejectReason.UNSUPPORTED_KIND
        if (
            flag in self._flags.named  # else it stands at its default, which costs a call to find out
            and not self._flags.evaluate(flag, standing.members, request.user_id, default=True).enabled
        ):
            return RejectReason.FLAG_DISABLED
        most = self._policy.open_jobs_max
        if len(self._jobs.by_id) >= most or 2 * standing.accounts[-1].running >= most:
            return RejectReason.POOL_FULL  # a root and its children leave half of the places to others
        return None

    def _charged(self, accounts: Iterable[Account], root: str) -> list[Emit]:
        """Have what one more job was charged to stored; the signals are those of thresholds that it has reached."""
        signals: list[Emit] = []
        for account in accounts:
            if not account.touched:
                self._standings.touch(account)
            if not account.is_quiet():
                signals += self._signals(account, root)
        return signals

    def _signals(self, account: Account, root: str) -> Iterator[Emit]:
        """Tell of the thresholds that are reached for the first time."""
        for signal in account.crossed_thresholds():
            suffix = f"threshold/{account.tenant_id}/{signal.quota}/{signal.percent}"
            yield Emit("tenant-signals", signal, account.tenant_id, root, suffix, account.tenant_id)

    def _finished(self, finished: JobFinished, now_ms: int) -> Outcome:
        if finished.job_id in self._jobs.by_id:  # else a repeated result: the reservation has ended, and ends once
            self._end(finished.job_id, now_ms)
        return NOTHING

    def _end(self, job_id: str, now_ms: int) -> None:
        """End a reservation, at every level."""
        for member in self._jobs.end(job_id):
            account = self._standings.account(member, now_ms)
            if account is not None:
                account.release()
                self._standings.touch(account)

    def _used(self, record: Record, used: UsageRecorded, now_ms: int) -> Outcome:
        standing = self._standings.of(record.event.tenantid, record.key, now_ms)
        if standing is None:
            raise RecordError("unknown-tenant", f"usage of the unknown tenant {record.event.tenantid}")
        if self._seen.repeated(record, now_ms):
            return NOTHING
        require_whole(standing)
        kept = record_use(standing.accounts, used.resource, used.quantity)
        self._seen.remember(record, now_ms)
        if not kept:
            return NOTHING  # metered by the noisy-neighbour fold; no quota hangs on it
        for account in standing.accounts:
            self._standings.touch(account)
        return Outcome({}, tuple(emit for account in standing.accounts for emit in self._signals(account, record.key)))

    def _tenant_changed(self, record: Record, changed: TenantChanged, now_ms: int) -> Outcome:
        tenant_id = record.event.tenantid
        if record.key != changed.root_id:
            raise RecordError("foreign-tenant", f"the key {record.key!r} is not the root of {tenant_id}")
        if changed.burst is not None and changed.burst > quotas.BURST_MAX:
            raise RecordError("out-of-range", f"a burst of {changed.burst} is beyond {quotas.BURST_MAX}")
        key = f"tenant/{tenant_id}"
        current = value_of(self._state, key, Tenant)
        if current is not None and current.version > changed.version:
            return NOTHING
        if current is not None and current.root_id != changed.root_id:
            raise RecordError(
                "root-moved", f"{tenant_id} lies under {current.root_id}; its state cannot move elsewhere"
            )
        acknowledged, suffix = TenantAcknowledged(version=changed.version), f"acknowledged/{record.offset}"
        told = Emit("tenant-signals", acknowledged, tenant_id, record.key, suffix, tenant_id)
        if current is not None and current.version == changed.version:
            return Outcome({}, (told,))  # again, since who asks may have missed it; the relay may publish it twice
        tenant = Tenant(
            changed.version,
            changed.tier,
            changed.status,
            TenantId(changed.root_id),
            TenantId(changed.parent_id) if changed.parent_id else None,
            dict(changed.quotas),
            changed.burst,
        )
        limits = self._standings.limits_of(tenant)
        self._standings.change(tenant_id, limits, now_ms)
        return Outcome({key: tenant}, (*self._announce(record, changed.version, limits), told))

    def _erase(self, record: Record, erased: TenantErased, now_ms: int) -> Outcome:
        """Keep nothing of a tenant; what its parents' levels count of it as held is given back there.

        Raises:
            RecordError: ``foreign-tenant``; the key is not the tenant's root.
        """
        tenant_id = record.event.tenantid
        if record.key != erased.root_id or tenant_id == PLATFORM:
            raise RecordError("foreign-tenant", f"the key {record.key[:100]!r} is not the root of {tenant_id}")
        known = self._standings.account(tenant_id, now_ms) is not None
        standing = self._standings.of(tenant_id, record.key, now_ms) if known else None
        gone = [f"tenant/{tenant_id}", f"usage/{tenant_id}", *map(setting_key, self._flags.forget(tenant_id))]
        for job_id in self._jobs.of(tenant_id):
            self._end(job_id, now_ms)
        if standing is not None:
            give_back(standing.accounts)
            for account in standing.accounts[1:]:
                self._standings.touch(account)
        self._seen.disown(tenant_id, self._state)
        self._standings.forget(tenant_id)
        self._erased.add(tenant_id)
        changes: dict[str, Value | None] = dict.fromkeys(gone, None)
        changes[f"erased/{tenant_id}"] = Erased(erased.version)
        return Outcome(changes, (*self._places.take(tenant_id), *passed_on(record, erased, self._policy.pools)))

    def _late(self, record: Record, now_ms: int) -> Outcome:
        """What still comes of an erased tenant. A request is refused, each time it comes, as that of no tenant; its
        erasure is answered again, since who asks may have missed the answer; all else is of no use to anybody.
        """
        match record.event.data:
            case JobRequested() as request:
                refused = refusal_of(record, request, RejectReason.UNKNOWN_TENANT, now_ms)
                return Outcome({}, (_decision(refused, record.event.tenantid, record.key),))
            case TenantErased() as erased if record.key == erased.root_id:
                return Outcome({}, passed_on(record, erased, self._policy.pools))
            case _:
                return NOTHING

    def _announce(self, record: Record, version: int, limits: Limits) -> Iterable[Emit]:
        """Tell every pool the tenant's weight."""
        tenant = record.event.tenantid
        weighted = TenantWeighted(
            weight=limits.weight, enterprise=limits.enterprise, max_running=limits.max_running, version=version
        )
        for pool in range(self._policy.pools):
            yield Emit("pool-inputs", weighted, tenant, record.key, f"weighted/{pool}", tenant, partition=pool)

    def _flag_changed(self, record: Record, flag: FlagState) -> Outcome:
        if not flag.flag.startswith(GATING):
            return NOTHING
        tenant = record.event.tenantid
        current = self._flags.get(flag.flag, tenant, flag.user_id)
        if current is not None and current.version >= flag.version:
            return NOTHING
        setting = setting_of(tenant, flag)
        self._flags.put(setting)
        return Outcome({setting_key(setting): setting})

    def _cancel_requested(self, record: Record, cancel: JobCancelRequested) -> Outcome:
        held = self._jobs.by_id.get(cancel.job_id)
        if held is None or held.tenant != record.event.tenantid:
            return NOTHING  # finished, never admitted, or not this tenant's: there is nothing to cancel
        body = PoolCancelRequested(job_id=cancel.job_id, reason=cancel.reason)
        tenant, key, pool = record.event.tenantid, record.key, self._places.pool_of(record.key)
        told = Emit("pool-inputs", body, tenant, key, "cancel", cancel.job_id, partition=pool)
        return Outcome({}, (*self._places.take(tenant), told))

    def _tick(self, now_ms: int) -> Outcome:
        """Once a second: report the usage of tenants that were active since the last tick."""
        emits = []
        for tenant_id in sorted(self._standings.changed):
            account = self._standings.account(tenant_id, now_ms)
            tenant = value_of(self._state, f"tenant/{tenant_id}", Tenant)
            if tenant is not None and account is not None:
                report = self._report(account, now_ms)
                # A tick can be in the log twice, its round cannot.
                suffix = f"usage/{self._standings.round}/{tenant_id}"
                emits.append(Emit("tenant-signals", report, tenant_id, tenant.root_id, suffix, tenant_id))
        if not self._standings.changed:
            return Outcome({}, tuple(emits))
        return Outcome({"reports/": self._standings.next_round()}, tuple(emits))

    def _report(self, account: Account, now_ms: int) -> TenantUsage:
        limits = account.limits
        start_ms, end_ms = self._month_of(now_ms)
        return TenantUsage(
            as_of_ms=now_ms,
            window_start_ms=start_ms,
            window_end_ms=end_ms,
            used={
                Resource.REQUESTS: account.requests,
                Resource.STORAGE_BYTES: account.storage_bytes,
                Resource.CUSTOM_DOMAINS: account.domains,
                Resource.RECONCILIATIONS: account.month_jobs if account.month_start_ms == start_ms else 0,
            },
            running=account.running,
            limits=limits.by_quota,
            rate_tokens_used=limits.rate.burst - account.tokens_left(now_ms),
            rate_burst=limits.rate.burst,
        )

    def _month_of(self, now_ms: int) -> tuple[int, int]:
        if not self._month[0] <= now_ms < self._month[1]:
            self._month = quotas.month_bounds(now_ms)
        return self._month


def _decision(decided: JobDecided, tenant: TenantId, root: str) -> Emit:
    """A job has one decision, which has the job's id."""
    job_id = decided.job_id
    return Emit("job-decisions", decided, tenant, root, "decided", job_id, None, job_id)
