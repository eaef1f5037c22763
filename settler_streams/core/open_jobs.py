"""Open jobs: those that were admitted and have not ended. Each holds a slot at every level of its tenant's chain.

In memory each job is known by itself. Stored are those that a step has admitted of one tenant together, under
``jobs/<offset of the first one's request>``, a few at a time: an admission costs a fraction of a record, and a job that
ends rewrites few others. No offset is consumed twice, so no key comes again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from settler_streams.core.fold import Record, State, Value
from settler_streams.ids import TenantId

TOGETHER_MAX = 16
"""Jobs stored together at most: what a lone job's end can make the step write again, a kilobyte at most."""
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


@dataclass(slots=True, eq=False)
class Together:
    """Jobs that are stored together; ``jobs`` has those that are still open, in order."""

    key: str
    tenant: TenantId
    chain: tuple[TenantId, ...]
    source: str
    jobs: dict[str, None]

    def value(self) -> Reservations | None:
        """What is stored of them; nothing once all have ended."""
        return Reservations(self.tenant, self.chain, self.source, tuple(self.jobs)) if self.jobs else None


class OpenJobs:
    """The open jobs of one fold."""

    def __init__(self, state: State) -> None:
        self._by_id: dict[str, Together] = {}
        self._filling: dict[TenantId, Together] = {}
        """What the step's next job of a tenant may be stored with."""
        self._touched: dict[str, Together] = {}
        self.by_id: Mapping[str, Together] = self._by_id
        """Whose each open job is."""
        for key, value in state.items():
            if isinstance(value, Reservations):
                self._load(Together(key, value.tenant, value.chain, value.source, dict.fromkeys(value.jobs)))
            elif isinstance(value, Reservation):
                job_id = key.partition("/")[2]
                self._load(Together(key, value.tenant, value.chain, value.source, {job_id: None}))

    def _load(self, together: Together) -> None:
        self._by_id.update(dict.fromkeys(together.jobs, together))

    def add(self, record: Record, chain: tuple[TenantId, ...]) -> None:
        """The job that ``record`` asks for is admitted."""
        event = record.event
        together = self._filling.get(event.tenantid)
        if (
            together is None
            or len(together.jobs) >= TOGETHER_MAX
            or together.chain is not chain  # it may have changed within the step
            or together.source != event.source
        ):
            together = Together(f"{PREFIX}/{record.offset}", event.tenantid, chain, event.source, {})
            self._filling[event.tenantid] = self._touched[together.key] = together
        together.jobs[event.id] = None
        self._by_id[event.id] = together

    def end(self, job_id: str) -> tuple[TenantId, ...]:
        """The job is open no more; returns whose slots become free.

        Raises:
            KeyError: it is not open.
        """
        together = self._by_id.pop(job_id)
        del together.jobs[job_id]
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
