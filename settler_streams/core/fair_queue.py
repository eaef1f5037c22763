"""Two-lane start-time fair queueing, SFQ(D): which tenant's job takes the next free slot of a pool.

Theory (Goyal, Vin, Cheng 1996; Jin, Chase, Kaur 2004). Each tenant has a **finish tag**: the cost it was charged
divided by its weight. The next slot goes to the eligible tenant with the least tag; its tag then advances by the
estimated cost over its weight, and the lane's **virtual time** to the tag that was served. A tenant is *eligible* while
it has a queued job and runs fewer than its cap. When it becomes eligible, a new **epoch** of it begins, and its tag is
lifted to the virtual time: time spent idle, capped or paused earns nothing.

The measured cost replaces the estimate when the job ends. A refund for a job of the present epoch is paid in full, even
below the virtual time, because the tenant stood in the queue all the while. A refund for an earlier epoch never lowers
the tag below what the present epoch alone has cost (the **floor tag**), so no over-estimate turns idle time into
credit.

The tag belongs to the tenant, not to its queued jobs. So priorities, cancels and weight changes act on a backlog of any
size at once, and a decision costs O(log tenants) plus O(log jobs of one tenant).

Lanes. Enterprise owns ``reserved_per_mille`` of the slots, everyone else the rest. A lane below its share takes the
next slot; a lane borrows what the other leaves idle, and returns it as jobs end. If the shares are no whole numbers,
one slot is left between them: while both lanes want it, it goes to the lane that has had less than its share of the
work since. Hence neither lane starves, even in a pool of one slot.

Everything here is rebuilt bit for bit from the values that ``drain_changes`` hands out.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from settler_streams.core.lane import COMPACTION_SLACK, Lane, Tenant
from settler_streams.core.pool_values import (
    CHARGED_US_MAX,
    Changes,
    Contract,
    Dispatch,
    PoolClock,
    QueuedJob,
    TenantShare,
    queue_key,
)
from settler_streams.errors import ConflictError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from settler_streams.ids import JobId, TenantId

CONTESTED_BALANCE_MAX = 1_000 * 600_000_000
"""The most that a lane may be owed of the slot between the shares: one job of ten minutes, so old turns are settled
soon."""


class FairQueue:
    """The jobs of one pool. A mutable index that its fold owns; every operation is deterministic."""

    def __init__(self, slots: int, reserved_per_mille: int = 250) -> None:
        if slots < 0 or not 0 <= reserved_per_mille <= 1_000:
            raise InvalidRequestError(f"not a pool: {slots} slots, {reserved_per_mille} per mille reserved")
        self.reserved_per_mille = reserved_per_mille
        self._slots = slots
        self._contested_balance = 0
        self._tenants: dict[TenantId, Tenant] = {}
        self._jobs: dict[JobId, QueuedJob] = {}
        self._running: dict[JobId, None] = {}
        self._lanes = (Lane(False, self._tenants), Lane(True, self._tenants))
        self._touched_tenants: dict[TenantId, None] = {}
        self._touched_jobs: dict[JobId, None] = {}
        self._persisted_clock: PoolClock | None = None

    @classmethod
    def restore(
        cls,
        clock: PoolClock,
        tenants: Iterable[TenantShare],
        jobs: Iterable[QueuedJob],
        reserved_per_mille: int = 250,
    ) -> FairQueue:
        """Rebuild the queue, in any order of its values, so that each later decision equals the original's."""
        queue = cls(clock.slots, reserved_per_mille)
        queue._contested_balance = clock.contested_balance
        queue._lanes[False].virtual_time = clock.standard_virtual_time
        queue._lanes[True].virtual_time = clock.enterprise_virtual_time
        queue._persisted_clock = clock
        for share in tenants:
            queue._tenants[share.tenant] = Tenant(
                share.contract, share.finish_tag, share.floor_tag, share.epoch, share.job_us_max
            )
        for job in jobs:
            tenant = queue._tenants[job.tenant]
            queue._jobs[job.job_id] = job
            queue._count(tenant, queued=not job.running, running=job.running)
            if job.running:
                queue._running[job.job_id] = None
            else:
                heappush(tenant.heap, queue_key(job))
        for tenant_id, tenant in queue._tenants.items():
            queue._lane(tenant).index(tenant_id, tenant)
        return queue

    # What stands

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def queued(self) -> int:
        return self._lanes[False].queued + self._lanes[True].queued

    @property
    def running(self) -> int:
        return self._lanes[False].running + self._lanes[True].running

    @property
    def clock(self) -> PoolClock:
        return PoolClock(
            self._slots, self._lanes[False].virtual_time, self._lanes[True].virtual_time, self._contested_balance
        )

    def job(self, job_id: JobId) -> QueuedJob | None:
        return self._jobs.get(job_id)

    def jobs(self) -> Iterator[QueuedJob]:
        return iter(self._jobs.values())

    def running_jobs(self) -> Iterator[QueuedJob]:
        return (self._jobs[job_id] for job_id in self._running)

    def backlog(self, tenant_id: TenantId) -> list[QueuedJob]:
        """The tenant's queued jobs in the order in which they will run; O(n log n), for diagnosis."""
        tenant = self._tenants.get(tenant_id)
        keys = [] if tenant is None else sorted(key for key in set(tenant.heap) if self._is_queued(key))
        return [self._jobs[key[3]] for key in keys]

    def shares(self) -> Iterator[TenantShare]:
        """Every remembered tenant."""
        return (self._share(tenant_id, tenant) for tenant_id, tenant in self._tenants.items())

    def share(self, tenant_id: TenantId) -> TenantShare | None:
        tenant = self._tenants.get(tenant_id)
        return None if tenant is None else self._share(tenant_id, tenant)

    def is_eligible(self, tenant_id: TenantId) -> bool:
        """Whether the tenant has a queued job and room under its cap."""
        tenant = self._tenants.get(tenant_id)
        return tenant is not None and tenant.eligible

    def virtual_time(self, *, enterprise: bool) -> int:
        return self._lanes[enterprise].virtual_time

    def drain_changes(self) -> Changes:
        """The values to persist: one per key touched since the last call."""
        tenants = {tenant_id: self.share(tenant_id) for tenant_id in self._touched_tenants}
        jobs = {job_id: self._jobs.get(job_id) for job_id in self._touched_jobs}
        clock = self.clock if self.clock != self._persisted_clock else None
        self._touched_tenants, self._touched_jobs, self._persisted_clock = {}, {}, self.clock
        return Changes(tenants, jobs, clock)

    # What happens

    def enqueue(self, job: QueuedJob, contract: Contract) -> None:
        """Queue a job of a tenant whose contract is ``contract`` from now on.

        Raises:
            ConflictError: the pool already holds a job of this id.
        """
        if job.job_id in self._jobs:
            raise ConflictError(f"job {job.job_id} is already in the pool")
        tenant = self._tenants.get(job.tenant)
        if tenant is None:
            virtual_time = self._lanes[contract.enterprise].virtual_time
            tenant = self._tenants[job.tenant] = Tenant(contract, virtual_time, virtual_time, 0, 0)
        old_lane = self._lane(tenant)
        self._adopt(tenant, contract)
        self._push_queued(tenant, job)
        self._settle(job.tenant, tenant, old_lane)

    def set_contract(self, tenant_id: TenantId, contract: Contract) -> None:
        """Apply a change of tier, weight or cap to the whole backlog at once.

        Nothing to do for a tenant that is not remembered: its next ``enqueue`` brings its contract.
        """
        tenant = self._tenants.get(tenant_id)
        if tenant is not None and tenant.contract != contract:
            old_lane = self._lane(tenant)
            self._adopt(tenant, contract)
            self._settle(tenant_id, tenant, old_lane)

    def set_slots(self, slots: int) -> None:
        """Grow or shrink the pool; running jobs beyond its size end in their own time."""
        if slots < 0:
            raise InvalidRequestError(f"a pool has no {slots} slots")
        self._slots = slots

    def cancel(self, tenant_id: TenantId, job_id: JobId) -> bool:
        """Take a queued job away. False if there is none of this tenant's, or if it runs (then its end ends it)."""
        job = self._jobs.get(job_id)
        if job is None or job.running or job.tenant != tenant_id:
            return False
        tenant = self._tenants[tenant_id]
        self._drop(job)
        self._count(tenant, queued=-1)
        self._settle(tenant_id, tenant)
        return True

    def dispatch(self, now_ms: int) -> Dispatch | None:
        """Give one free slot to the job whose turn it is. None: no slot is free, or nobody may run."""
        if self.running >= self._slots:
            return None
        enterprise, contested = self._next_lane()
        lane = self._lanes[enterprise]
        if not lane.eligible:
            return None
        tag, tenant_id = lane.pop_eligible()
        tenant = self._tenants[tenant_id]
        job = self._pop_queued(tenant)
        charged_us = min(max(1, job.estimated_us), CHARGED_US_MAX)
        attempt = job.attempt + 1
        self._put(
            QueuedJob(
                tenant_id, job.job_id, job.priority, job.seq, job.estimated_us,
                attempt, True, charged_us, tenant.epoch, contested, now_ms, job.spared,
            )
        )  # fmt: skip
        self._running[job.job_id] = None
        self._count(tenant, queued=-1, running=1)
        lane.virtual_time = max(lane.virtual_time, tag)
        tenant.advance(tenant.tag_units(charged_us))
        tenant.job_us_max = max(tenant.job_us_max, job.estimated_us)
        if contested:
            self._charge_contested(enterprise, charged_us)
        self._settle(tenant_id, tenant)
        return Dispatch(tenant_id, job.job_id, attempt, enterprise)

    def finished(self, job_id: JobId, measured_us: int) -> bool:
        """End a job, running or back in the queue, at the cost it really had. False: a repeated or foreign report."""
        job = self._jobs.get(job_id)
        if job is None:
            return False
        tenant = self._tenants[job.tenant]
        self._correct(tenant, job, max(0, measured_us))
        self._drop(job)
        self._count(tenant, queued=-(not job.running), running=-job.running)
        self._settle(job.tenant, tenant)
        return True

    def requeue(self, job_id: JobId, attempt: int, used_us: int = 0, *, spared: bool = False) -> bool:
        """Put a job whose executor died at the front of its tenant's queue, charged ``used_us`` for the lost attempt.

        A ``spared`` attempt keeps its number and does not count as a try. False if that attempt does not run: it has
        ended or was requeued already.
        """
        job = self._jobs.get(job_id)
        if job is None or not job.running or job.attempt != attempt:
            return False
        tenant = self._tenants[job.tenant]
        used_us = max(0, used_us)
        self._correct(tenant, job, used_us)
        del self._running[job_id]
        self._count(tenant, running=-1)
        # The charge stays on record: should the dead executor report after all, its measure replaces it.
        self._push_queued(
            tenant,
            QueuedJob(
                job.tenant, job_id, job.priority, job.seq, job.estimated_us,
                attempt, False, used_us, job.epoch, job.contested, spared=job.spared + spared,
            ),
        )  # fmt: skip
        self._settle(job.tenant, tenant)
        return True

    def forget(self, tenant_id: TenantId) -> None:
        """Forget a tenant, its credit and its debt.

        Raises:
            ConflictError: it has jobs.
        """
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            return
        if tenant.queued or tenant.running:
            raise ConflictError(f"tenant {tenant_id} has jobs in the pool")
        del self._tenants[tenant_id]  # what the lanes' heaps hold of it is dead from here on
        self._touched_tenants[tenant_id] = None

    # How it is done

    def _lane(self, tenant: Tenant) -> Lane:
        return self._lanes[tenant.contract.enterprise]

    def _share(self, tenant_id: TenantId, tenant: Tenant) -> TenantShare:
        return TenantShare(
            tenant_id, tenant.contract, tenant.finish_tag, tenant.floor_tag, tenant.epoch, tenant.job_us_max
        )

    def _adopt(self, tenant: Tenant, contract: Contract) -> None:
        """Under a new weight, what the tenant is ahead of the virtual time counts as the same amount of work, and
        credit below it lapses. In a new lane the tenant stands as far ahead as in the old one.
        """
        old, old_lane = tenant.contract, self._lane(tenant)
        if (old.weight, old.enterprise) == (contract.weight, contract.enterprise):
            tenant.contract = contract
            return
        ahead = max(0, tenant.finish_tag - old_lane.virtual_time)
        old_lane.leave(tenant)
        tenant.contract = contract
        lane = self._lane(tenant)
        lane.enter(tenant)
        tenant.epoch += 1
        tenant.floor_tag = lane.virtual_time
        tenant.finish_tag = lane.virtual_time + ahead * old.weight // contract.weight

    def _count(self, tenant: Tenant, queued: int = 0, running: int = 0) -> None:
        lane = self._lane(tenant)
        lane.queued += queued
        lane.running += running
        tenant.queued += queued
        tenant.running += running

    def _put(self, job: QueuedJob) -> None:
        self._jobs[job.job_id] = job
        self._touched_jobs[job.job_id] = None

    def _drop(self, job: QueuedJob) -> None:
        del self._jobs[job.job_id]
        self._running.pop(job.job_id, None)
        self._touched_jobs[job.job_id] = None

    def _push_queued(self, tenant: Tenant, job: QueuedJob) -> None:
        self._put(job)
        self._count(tenant, queued=1)
        heappush(tenant.heap, queue_key(job))

    def _is_queued(self, key: tuple[bool, int, int, JobId]) -> bool:
        job = self._jobs.get(key[3])
        return job is not None and not job.running and queue_key(job) == key

    def _pop_queued(self, tenant: Tenant) -> QueuedJob:
        while True:  # an eligible tenant has a queued job, so the heap holds its key
            key = heappop(tenant.heap)
            if self._is_queued(key):
                return self._jobs[key[3]]

    def _next_lane(self) -> tuple[bool, bool]:
        """Which lane takes the free slot, and whether its work counts in the turns at the slot between the shares."""
        standard, enterprise = self._lanes
        if not enterprise.eligible or not standard.eligible:
            return enterprise.eligible > 0, False
        reserved = self._slots * self.reserved_per_mille
        contested = reserved % 1_000 > 0
        if enterprise.running < reserved // 1_000:
            return True, contested
        if standard.running < (self._slots * 1_000 - reserved) // 1_000:
            return False, contested
        return self._contested_balance <= 0, contested

    def _charge_contested(self, enterprise: bool, cost_us: int) -> None:
        reserved = self.reserved_per_mille
        balance = self._contested_balance + cost_us * (1_000 - reserved if enterprise else -reserved)
        self._contested_balance = max(-CONTESTED_BALANCE_MAX, min(balance, CONTESTED_BALANCE_MAX))

    def _correct(self, tenant: Tenant, job: QueuedJob, measured_us: int) -> None:
        """Replace what the job's last attempt was charged by what it cost."""
        units = tenant.tag_units(measured_us) - tenant.tag_units(job.charged_us)
        if units > 0 or job.epoch == tenant.epoch:
            tenant.advance(units)
        else:
            tenant.finish_tag = max(tenant.finish_tag + units, tenant.floor_tag)
        tenant.job_us_max = max(tenant.job_us_max, measured_us)
        if job.contested:
            self._charge_contested(tenant.contract.enterprise, measured_us - job.charged_us)

    def _settle(self, tenant_id: TenantId, tenant: Tenant, old_lane: Lane | None = None) -> None:
        """Bring the indexes in line after any change to a tenant. Each operation ends with it."""
        self._touched_tenants[tenant_id] = None
        lane = self._lane(tenant)
        lane.settle(tenant_id, tenant)
        if len(tenant.heap) > 2 * tenant.queued + COMPACTION_SLACK:
            tenant.heap = sorted(key for key in set(tenant.heap) if self._is_queued(key))
        self._touched_tenants.update(dict.fromkeys(lane.forget_idle()))
        if old_lane is not None and old_lane is not lane:
            self._touched_tenants.update(dict.fromkeys(old_lane.forget_idle()))
