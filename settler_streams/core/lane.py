"""One lane of a pool: its eligible tenants by finish tag, and the idle ones that it still has to remember.

The heaps hold dead entries: when a tag changes, a new entry is pushed and the old one is skipped when it comes up.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from settler_streams.core.pool_values import TAG_UNITS_PER_US, Contract

if TYPE_CHECKING:
    from settler_streams.ids import JobId, TenantId

COMPACTION_SLACK = 64
"""Dead entries that a heap may hold beyond twice its live ones before it is rebuilt: rebuilding costs O(1) per push."""


class Tenant:
    """One tenant's tags and counts, and the keys of its queued jobs (dead ones included)."""

    __slots__ = (
        "contract",
        "eligible",
        "entry_tag",
        "epoch",
        "finish_tag",
        "floor_tag",
        "heap",
        "job_us_max",
        "queued",
        "running",
    )

    def __init__(self, contract: Contract, finish_tag: int, floor_tag: int, epoch: int, job_us_max: int) -> None:
        self.contract = contract
        self.finish_tag = finish_tag
        self.floor_tag = floor_tag
        self.epoch = epoch
        self.job_us_max = job_us_max
        self.eligible = False
        self.entry_tag: int | None = None  # the tag under which the lane's heap holds it
        self.queued = 0
        self.running = 0
        self.heap: list[tuple[bool, int, int, JobId]] = []

    def wants_slot(self) -> bool:
        cap = self.contract.max_running
        return self.queued > 0 and (cap is None or self.running < cap)

    def tag_units(self, cost_us: int) -> int:
        return cost_us * TAG_UNITS_PER_US // self.contract.weight

    def advance(self, units: int) -> None:
        self.finish_tag += units
        self.floor_tag += units


class Lane:
    """A lane's virtual time (tag units), its counts and its two heaps over the pool's common table of tenants."""

    __slots__ = ("_heap", "_idle", "_tenants", "eligible", "enterprise", "queued", "running", "virtual_time")

    def __init__(self, enterprise: bool, tenants: dict[TenantId, Tenant], virtual_time: int = 0) -> None:
        self.enterprise = enterprise
        self.virtual_time = virtual_time
        self.queued = 0
        self.running = 0
        self.eligible = 0
        self._tenants = tenants
        self._heap: list[tuple[int, TenantId]] = []
        self._idle: list[tuple[int, TenantId]] = []

    def settle(self, tenant_id: TenantId, tenant: Tenant) -> None:
        """Bring the lane in line after any change to one of its tenants. An epoch begins here."""
        wants_slot = tenant.wants_slot()
        if wants_slot and not tenant.eligible:
            tenant.epoch += 1
            tenant.floor_tag = self.virtual_time
            tenant.finish_tag = max(tenant.finish_tag, self.virtual_time)
        self.index(tenant_id, tenant)

    def index(self, tenant_id: TenantId, tenant: Tenant) -> None:
        """Put a tenant where its counts and tags say it belongs, without touching its tags."""
        wants_slot = tenant.wants_slot()
        self.eligible += wants_slot - tenant.eligible
        tenant.eligible = wants_slot
        if not wants_slot:
            tenant.entry_tag = None
        elif tenant.entry_tag != tenant.finish_tag:
            tenant.entry_tag = tenant.finish_tag
            heappush(self._heap, (tenant.finish_tag, tenant_id))
        if not tenant.queued and not tenant.running:
            heappush(self._idle, (tenant.finish_tag, tenant_id))
        self._compact()

    def leave(self, tenant: Tenant) -> None:
        """Take a tenant out, to be settled anew, here or in the other lane."""
        self.eligible -= tenant.eligible
        self.queued -= tenant.queued
        self.running -= tenant.running
        tenant.eligible, tenant.entry_tag = False, None

    def enter(self, tenant: Tenant) -> None:
        """Count a tenant in, with its jobs."""
        self.queued += tenant.queued
        self.running += tenant.running

    def pop_eligible(self) -> tuple[int, TenantId]:
        """The least tag and its tenant; only while ``eligible`` is above 0, so the heap holds a live entry."""
        while True:
            entry = heappop(self._heap)
            if self._is_live(entry):
                self._tenants[entry[1]].entry_tag = None
                return entry

    def forget_idle(self) -> list[TenantId]:
        """Forget tenants without jobs that the virtual time has caught up with: they equal newcomers.

        With the last job of a lane its busy period ends, and with it every debt: its virtual time starts again at 0.
        """
        forgotten = []
        busy_ended = not self.queued and not self.running
        while self._idle and (busy_ended or self._idle[0][0] <= self.virtual_time):
            entry = heappop(self._idle)
            if self._is_idle(entry):
                del self._tenants[entry[1]]
                forgotten.append(entry[1])
        if busy_ended:
            self.virtual_time = 0
            self._heap.clear()
        return forgotten

    def _is_live(self, entry: tuple[int, TenantId]) -> bool:
        tenant = self._tenants.get(entry[1])
        if tenant is None or not tenant.eligible or tenant.finish_tag != entry[0]:
            return False
        return tenant.contract.enterprise == self.enterprise

    def _is_idle(self, entry: tuple[int, TenantId]) -> bool:
        tenant = self._tenants.get(entry[1])
        if tenant is None or tenant.queued or tenant.running or tenant.finish_tag != entry[0]:
            return False
        return tenant.contract.enterprise == self.enterprise

    def _compact(self) -> None:
        """Keep each heap within twice its live entries; a sorted list is a heap."""
        if len(self._heap) > 2 * self.eligible + COMPACTION_SLACK:
            self._heap = sorted(entry for entry in set(self._heap) if self._is_live(entry))
        if len(self._idle) > 2 * len(self._tenants) + COMPACTION_SLACK:
            self._idle = sorted(entry for entry in set(self._idle) if self._is_idle(entry))
