"""Retention: each tenant says how long its ended jobs, its usage and its audit log are kept; the rest is deleted.

What may be deleted is decided by the database, row by row (``0013_retention.sql``; for jobs
``0024_rejected_jobs_end_too.sql``, for usage ``0030_usage_ages_from_its_windows_end.sql``), whatever this program asks
for.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from settler_streams.adapters.postgres import queries as statements
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.ids import TenantId
from settler_streams.services import audit, queries, tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.background import in_background
from settler_streams.services.directory import TenantDirectory

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

log = structlog.get_logger(__name__)

BATCH_JOBS_MAX = 500
BATCH_ROWS_MAX = 50_000
"""Rows of one transaction: some tenths of a second, so that none waits long for what it has locked. A single job with
more result rows is still deleted at once: a reader sees all of a job or nothing of it."""
INTERVAL_S = 3600.0
"""Between two rounds over all tenants; periods are days."""
FAILED_IN_A_ROW_MAX = 3
"""One tenant that cannot be swept keeps none behind it waiting. When so many in a row cannot be, the database is away,
and the others would fail as well, each after a wait of its own."""
STOP_DEADLINE_S = 10.0
KEEP_DAYS_MAX = 36_500
AUDIT_DAYS_MIN = 90


class RetentionKind(enum.StrEnum):
    """What has a period of its own. Ended jobs, the rejected ones among them, go with their attempts and results, usage
    with its signals. Usage is counted by calendar month, and is as old as its month's end."""

    EXECUTIONS = "executions"
    USAGE = "usage"
    AUDIT = "audit"


Retention = Mapping[RetentionKind, int | None]
"""Days for which each kind is kept; ``None``: for ever."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How many rows a sweep has deleted; a job counts once, whatever belonged to it."""

    jobs: int = 0
    usage: int = 0
    audit: int = 0

    def __add__(self, other: Swept) -> Swept:
        return Swept(self.jobs + other.jobs, self.usage + other.usage, self.audit + other.audit)


class RetentionService:
    """Keeps each tenant's periods, and deletes what is past them."""

    def __init__(self, pool: TenantConnectionPool) -> None:
        self._pool = pool

    async def get(self, tenant_id: TenantId) -> Retention:
        """How long each kind is kept.

        Raises:
            NotFoundError: there is no such tenant.
        """
        async with self._pool.tenant(tenant_id) as tx:
            return await _read(tx, tenant_id)

    async def change(
        self, tenant_id: TenantId, periods: Retention, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Retention:
        """Change the periods that are given, audited; the others stay. What is past its period goes at the next sweep.

        Raises:
            InvalidRequestError: a period is shorter or longer than its kind allows.
            NotFoundError: there is no such tenant.
        """
        for kind, days in periods.items():
            least = AUDIT_DAYS_MIN if kind is RetentionKind.AUDIT else 1
            if days is not None and not least <= days <= KEEP_DAYS_MAX:
                raise InvalidRequestError(f"{kind} can be kept for {least} to {KEEP_DAYS_MAX} days, or for ever")
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await _read(tx, tenant_id)
            after = {**before, **periods}
            if after == before:
                return before
            for kind, days in periods.items():
                if days is None:
                    await tx.execute(queries.KEEP_FOR_EVER, tenant_id, kind.value)
                else:
                    await tx.execute(queries.KEEP_FOR, tenant_id, kind.value, days)
            await tenant_store.record_owned(
                tx, tenant_id, "tenant.retention-changed", f"tenant/{tenant_id}", before=_audited(before),
                after=_audited(after), actor=actor, request_id=request_id,
            )  # fmt: skip
        return after

    async def sweep(self, tenant_id: TenantId) -> Swept:
        """Delete what is past the tenant's periods, in transactions of bounded size. Stopping it half-way is safe.

        One sweep of a tenant works at a time; another one deletes nothing meanwhile.

        Raises:
            UnavailableError: Postgres failed; what was deleted so far is gone, the next sweep does the rest.
        """
        swept = Swept()
        while True:
            jobs = await self._delete(tenant_id, statements.DELETE_OLD_JOBS, BATCH_JOBS_MAX, BATCH_ROWS_MAX)
            if not jobs:
                break
            swept += Swept(jobs=jobs)
        for query in (statements.DELETE_OLD_USAGE, statements.DELETE_OLD_SIGNALS):
            while rows := await self._delete(tenant_id, query, BATCH_ROWS_MAX):
                swept += Swept(usage=rows)
        while rows := await self._delete(tenant_id, statements.DELETE_OLD_AUDIT, BATCH_ROWS_MAX):
            swept += Swept(audit=rows)
        if swept != Swept():
            log.info("retention", tenant=tenant_id, jobs=swept.jobs, usage=swept.usage, audit=swept.audit)
        return swept

    async def sweep_all(self, tenants: Iterable[TenantId]) -> tuple[Swept, list[TenantId]]:
        """Sweep tenant after tenant, past one that fails; after :data:`FAILED_IN_A_ROW_MAX` in a row, no more.

        Returns:
            What was deleted of those that were swept to the end, and who was not.
        """
        swept, unswept, failed = Swept(), list[TenantId](), 0
        for tenant_id in tenants:
            if failed == FAILED_IN_A_ROW_MAX:
                unswept.append(tenant_id)
                continue
            try:
                swept += await self.sweep(tenant_id)
            except UnavailableError as error:
                log.warning("retention not kept for now", tenant=tenant_id, error=str(error))
                unswept.append(tenant_id)
                failed += 1
                continue
            except NotFoundError as error:
                log.info("retention is of no use", tenant=tenant_id, reason=str(error))  # erased meanwhile
            failed = 0
        return swept, unswept

    async def _delete(self, tenant_id: TenantId, query: str, *bounds: int) -> int:
        async with self._pool.janitor(tenant_id) as tx:
            if not await tx.fetchval(statements.ONE_JANITOR, tenant_id):
                return 0
            return int((await tx.execute(query, tenant_id, *bounds)).rpartition(" ")[2])


class RetentionSweeper:
    """Sweeps every tenant of the directory from time to time. Any number of processes may have one."""

    def __init__(self, retention: RetentionService, directory: TenantDirectory) -> None:
        self._retention = retention
        self._directory = directory
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; the first round starts at once."""
        self._stopping.clear()
        self._task = in_background(self._run(), "retention")

    async def stop(self) -> None:
        """End after the transaction under way."""
        if self._task is None:
            return
        self._stopping.set()
        await asyncio.wait([self._task], timeout=STOP_DEADLINE_S)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        while not self._stopping.is_set():
            # Who was not swept is tried again in the next round.
            await self._retention.sweep_all(itertools.takewhile(lambda _: not self._stopping.is_set(), self._directory))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._stopping.wait()


async def _read(tx: Transaction, tenant_id: TenantId) -> dict[RetentionKind, int | None]:
    rows = await tx.fetch(queries.READ_RETENTION, tenant_id)
    if not rows:
        raise NotFoundError(f"no tenant {tenant_id}")
    stored = {row["kind"]: row["keep_days"] for row in rows}
    return {kind: stored.get(kind.value) for kind in RetentionKind}


def _audited(periods: Retention) -> audit.Audited:
    return {kind.value: days for kind, days in periods.items()}
