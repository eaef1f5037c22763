"""Open jobs: those that were admitted and have not ended. Each holds a slot at every level of its tenant's chain.

In memory each job is known by itself. Stored are those that a step has admitted of one tenant together, under
``jobs/<offset of the first one's request>``, a few at a time: an admission costs a fraction of a record, and a job that
ends rewrites few others. Requests come from one topic, and none of its offsets is consumed twice: no key comes again.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from settler_streams.core.fold import Record, State, Value
from settler_streams.ids import TenantId

TOGETHER_MAX = 16
"""Jobs stored together at most: so few that a lone job's end, which writes the others again, costs 700 bytes or so, and
1.8 kB with the deepest chain and the longest source."""
PREFIX = "jobs"


class Reservations(Value, frozen=True, array_like=True):
    """Jobs of one tenant that came from one source; ``chain`` is the tenant and its parents up to the root."""

    tenant: TenantId
    chain: tuple[TenantId, ...]
    source: str
    jobs: tuple[str, ...]


class Reservation(Value, frozen=True, array_like=True):
    """One job by itself under ``job/<its id>``, as earlier versions have stored it. It is still read."""

    tenant: TenantId
    chain: tuple[TenantId, ...]
    admitted_at_ms: int
    source: str


class Together(msgspec.Struct, eq=False, gc=False):
    """Jobs that are stored together; ``jobs`` has those that are still open, in order."""

    key: str
    tenant: TenantId
    chain: tuple[TenantId, ...]
    source: str
    jobs: list[str]

    def value(self) -> Reservations | None:
        """What is stored of them; nothing once all have ended."""
        return Reservations(self.tenant, self.chain, self.source, tuple(self.jobs)) if self.jobs else None


class OpenJobs:
    """The open jobs of one fold."""

    def __init__(self, state: State) -> None:
        self._by_id: dict[str, Together] = {}
        self._filling: dict[tuple[TenantId, str], Together] = {}
        """What the step's next job of a tenant and source may be stored with."""
        self._touched: dict[str, Together] = {}
        self.by_id: Mapping[str, Together] = self._by_id
        """Whose each open job is."""
        for key, value in state.items():
            if isinstance(value, Reservations):
                self._load(Together(key, value.tenant, value.chain, value.source, list(value.jobs)))
            elif isinstance(value, Reservation):
                self._load(Together(key, value.tenant, value.chain, value.source, [key.partition("/")[2]]))

    def _load(self, together: Together) -> None:
        for job_id in together.jobs:
            if self._by_id.setdefault(job_id, together) is not together:
                raise ValueError(f"the open job {job_id} is stored under {self._by_id[job_id].key} and {together.key}")

    def add(self, record: Record, chain: tuple[TenantId, ...]) -> None:
        """The job that ``record`` asks for is admitted."""
        event = record.event
        whose = (event.tenantid, event.source)
        together = self._filling.get(whose)
        if (
            together is None
            or len(together.jobs) >= TOGETHER_MAX
            or together.chain is not chain  # it may have changed within the step
        ):
            together = Together(f"{PREFIX}/{record.offset}", event.tenantid, chain, event.source, [])
            self._filling[whose] = self._touched[together.key] = together
        together.jobs.append(event.id)
        self._by_id[event.id] = together

    def end(self, job_id: str) -> tuple[TenantId, ...]:
        """The job is open no more; returns whose slots become free.

        Raises:
            KeyError: it is not open.
        """
        together = self._by_id.pop(job_id)
        together.jobs.remove(job_id)
        self._touched[together.key] = together
        return together.chain

    def of(self, tenant: TenantId) -> list[str]:
        """The open jobs of ``tenant``, without its children's."""
        return sorted(job_id for job_id, together in self._by_id.items() if together.tenant == tenant)

    def settle(self) -> dict[str, Value | None]:
        """The changes that store which jobs were admitted and which have ended since the last call."""
        touched, self._touched = self._touched, {}
        self._filling.clear()
        return {key: together.value() for key, together in touched.items()}
