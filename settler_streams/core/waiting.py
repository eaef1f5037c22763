"""Why a job waits, and how far the fair queue stands from its bound. Reads the queue, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from settler_streams.core.pool_values import CHARGED_US_MAX, TAG_UNITS_PER_US, QueuedJob, TenantShare

if TYPE_CHECKING:
    from settler_streams.core.fair_queue import FairQueue
    from settler_streams.ids import JobId, TenantId

Reason = Literal["capped", "behind_own_jobs", "no_slot", "fair_turn"]


class Waiting(NamedTuple):
    """Why one job has not been dispatched.

    ``tenant_lag_us`` is the work by which the tenant is ahead of its lane's virtual time (negative: it is owed).
    ``share_per_mille`` is its share of the lane among the tenants that want slots now. ``jobs_ahead`` counts the queued
    jobs of the lane that go first if nothing arrives and every estimate holds. ``estimated_start_ms`` follows from
    them; None: never, as things stand (no slots, or a pause).
    """

    position_in_tenant: int
    tenant_lag_us: int
    share_per_mille: int
    jobs_ahead: int
    estimated_start_ms: int | None
    reason: Reason


class Lag(NamedTuple):
    """The tenant nearest to its bound: S1 holds while ``lag_us`` <= ``bound_us`` (both work over weight)."""

    tenant: TenantId
    lag_us: int
    bound_us: int

    @property
    def per_mille(self) -> int:
        return self.lag_us * 1_000 // max(1, self.bound_us)


def explain(queue: FairQueue, job_id: JobId, now_ms: int) -> Waiting | None:
    """Say why a queued job waits; None if it is not queued. Costs O(tenants + jobs ahead), so it is for questions."""
    job = queue.job(job_id)
    if job is None or job.running:
        return None
    share = queue.share(job.tenant)
    if share is None:
        return None
    own = queue.backlog(job.tenant)
    position = next(place for place, queued in enumerate(own) if queued.job_id == job_id)
    lane = [
        other
        for other in queue.shares()
        if other.contract.enterprise == share.contract.enterprise
        and other.tenant != job.tenant
        and queue.is_eligible(other.tenant)
    ]
    turn = share.finish_tag + sum(_tag_units(share, queued) for queued in own[:position])
    ahead = own[:position]
    for other in lane:
        ahead.extend(_before(queue, other, turn, share.tenant))
    weights = share.contract.weight + sum(other.contract.weight for other in lane)
    virtual_time = queue.virtual_time(enterprise=share.contract.enterprise)
    capped = not queue.is_eligible(job.tenant)
    return Waiting(
        position_in_tenant=position,
        tenant_lag_us=(share.finish_tag - virtual_time) * share.contract.weight // TAG_UNITS_PER_US,
        share_per_mille=share.contract.weight * 1_000 // weights,
        jobs_ahead=len(ahead),
        estimated_start_ms=_estimated_start_ms(queue, share, ahead, now_ms),
        reason="capped" if capped else "behind_own_jobs" if position else "fair_turn" if ahead else "no_slot",
    )


def lag_against_bound(queue: FairQueue) -> Lag | None:
    """The live S1 metric: of the tenants that want slots, the one whose distance from virtual time is worst.

    Each tenant's bound is ``(D + 1) * c_max / w``, D the slots and c_max its greatest job, so two tenants within theirs
    differ by at most the sum, which is S1. Costs O(tenants): sample it, do not ask per decision.
    """
    worst: Lag | None = None
    for share in queue.shares():
        if not queue.is_eligible(share.tenant):
            continue
        virtual_time = queue.virtual_time(enterprise=share.contract.enterprise)
        lag_us = abs(share.finish_tag - virtual_time) // TAG_UNITS_PER_US
        bound_us = (max(queue.slots, queue.running) + 1) * share.job_us_max // share.contract.weight
        lag = Lag(share.tenant, lag_us, bound_us)
        if worst is None or (lag.per_mille, lag.tenant) > (worst.per_mille, worst.tenant):
            worst = lag
    return worst


def _tag_units(share: TenantShare, job: QueuedJob) -> int:
    return min(max(1, job.estimated_us), CHARGED_US_MAX) * TAG_UNITS_PER_US // share.contract.weight


def _before(queue: FairQueue, other: TenantShare, turn: int, tenant: TenantId) -> list[QueuedJob]:
    """The jobs of ``other`` whose turn comes before the tag ``turn`` of ``tenant``; its cap is left out of account."""
    tag = other.finish_tag
    if (tag, other.tenant) > (turn, tenant):
        return []
    before = []
    for job in queue.backlog(other.tenant):
        if (tag, other.tenant) > (turn, tenant):
            break
        before.append(job)
        tag += _tag_units(other, job)
    return before


def _estimated_start_ms(queue: FairQueue, share: TenantShare, ahead: list[QueuedJob], now_ms: int) -> int | None:
    """All work ahead, with the rest of running jobs, over the lane's slots; not before the tenant's own cap allows."""
    contract = share.contract
    lane_wanted = {other.contract.enterprise for other in queue.shares() if queue.is_eligible(other.tenant)}
    lane_slots = queue.slots
    if (not contract.enterprise) in lane_wanted:
        per_mille = queue.reserved_per_mille if contract.enterprise else 1_000 - queue.reserved_per_mille
        lane_slots = -(-queue.slots * per_mille // 1_000)
    if lane_slots == 0 or contract.max_running == 0:
        return None
    rest_us, own_us = 0, 0
    for job in queue.running_jobs():
        runner = queue.share(job.tenant)
        if runner is None or runner.contract.enterprise != contract.enterprise:
            continue
        left_us = max(0, job.estimated_us - (now_ms - job.dispatched_ms) * 1_000)
        rest_us += left_us
        own_us += left_us if job.tenant == share.tenant else 0
    wait_us = (rest_us + sum(job.estimated_us for job in ahead)) // lane_slots
    if contract.max_running is not None:
        own_us += sum(job.estimated_us for job in ahead if job.tenant == share.tenant)
        wait_us = max(wait_us, own_us // contract.max_running)
    return now_ms + wait_us // 1_000
