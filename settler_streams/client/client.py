"""The SDK: submit jobs, record usage, set flags, and follow results, over Kafka or HTTP.

async with SettlerClient(KafkaTransport(settings), tenant) as client:
    job = await client.submit(left=FileRecords(path="bank.csv", format="csv"), right=..., rules=MatchRules())
    print((await job.result()).matches)
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from settler_streams.client.transport import Caller, Start, Transport
from settler_streams.core.job_requests import rules_of
from settler_streams.errors import InvalidRequestError, SettlerError
from settler_streams.events import (
    FileRecords,
    FlagAction,
    FlagCommand,
    FlagScope,
    InlineRecords,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobRequested,
    MatchRules,
    QueuePriority,
    Resource,
    UsageRecorded,
)
from settler_streams.ids import PLATFORM, JobId, TenantId, canonical_tenant, uuid7

RESULT_TIMEOUT_S = 300.0
"""How long a job's result is waited for unless the caller says otherwise."""


class JobRejectedError(SettlerError):
    """Admission refused the job; ``decision`` says why and when trying again makes sense."""

    def __init__(self, decision: JobDecided) -> None:
        wait = "" if decision.retry_after_ms is None else f"; try again in {decision.retry_after_ms} ms"
        limit = "" if decision.limit is None else f" ({decision.current} of {decision.limit})"
        super().__init__(f"job {decision.job_id} was rejected: {decision.reason}{limit}{wait}")
        self.decision = decision


class Job:
    """A submitted job."""

    def __init__(self, transport: Transport, caller: Caller, job_id: JobId) -> None:
        self._transport = transport
        self._caller = caller
        self.id = job_id

    async def decision(self, timeout_s: float = RESULT_TIMEOUT_S) -> JobDecided:
        """Admission's decision, admitted or rejected."""
        return await self._transport.decision(self._caller, self.id, timeout_s)

    async def result(self, timeout_s: float = RESULT_TIMEOUT_S) -> JobFinished:
        """The job's result.

        Raises:
            JobRejectedError: the job was not admitted.
            UnavailableError: there is no result yet after ``timeout_s``.
        """
        started = time.monotonic()
        decision = await self.decision(timeout_s)
        if not decision.admitted:
            raise JobRejectedError(decision)
        return await self._transport.result(self._caller, self.id, timeout_s - (time.monotonic() - started))


class SettlerClient:
    """A tenant's client. Several clients may share one transport; whoever enters one starts and stops it."""

    def __init__(self, transport: Transport, tenant: TenantId, *, root: TenantId | None = None) -> None:
        """``root`` is the tenant's root; without one, the tenant is its own.

        Raises:
            InvalidRequestError: ``tenant`` or ``root`` is not a UUID in canonical form.
        """
        try:
            self._caller = Caller(canonical_tenant(tenant), canonical_tenant(root or tenant))
        except ValueError as error:
            raise InvalidRequestError(f"a client needs its tenant's id: {error}") from error
        self._transport = transport

    async def __aenter__(self) -> Self:
        await self._transport.start()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._transport.stop()

    async def submit(
        self,
        *,
        left: FileRecords | InlineRecords,
        right: FileRecords | InlineRecords,
        rules: MatchRules | None = None,
        kind: str = "reconciliation",
        priority: QueuePriority = QueuePriority.NORMAL,
        user_id: str | None = None,
        estimated_cost_us: int | None = None,
        job_id: JobId | None = None,
    ) -> Job:
        """Submit a reconciliation; returns when the platform has stored the request.

        ``job_id`` makes a retry safe: submitting the same id again is the same job. It is a UUIDv7 in canonical form.

        Raises:
            InvalidRequestError: ``job_id`` is none, or the request is too large, breaks the schema, or has rules that
                cannot be matched by.
            UnavailableError: it is unknown whether the request was stored; submit it again with the same ``job_id``.
        """
        request = JobRequested(
            kind=kind,
            priority=priority,
            user_id=user_id,
            estimated_cost_us=estimated_cost_us,
            left=left,
            right=right,
            rules=rules or MatchRules(),
        )
        rules_of(request)  # refused here, it costs nothing
        if job_id is None:
            job_id = JobId(uuid7(time.time_ns() // 1_000_000))
        await self._transport.submit(self._caller, job_id, request)
        return Job(self._transport, self._caller, job_id)

    async def cancel(self, job_id: JobId, reason: str = "") -> None:
        """Ask for a job to be cancelled; one that has finished stays finished."""
        await self._transport.send(self._caller, JobCancelRequested(job_id=job_id, reason=reason))

    async def record_usage(self, resource: Resource, quantity: int) -> None:
        """Record something that the tenant used; a negative quantity gives storage back.

        Domains are counted by the platform.

        Raises:
            InvalidRequestError: over HTTP, for domains.
            UnavailableError: it is unknown whether the event was stored.
        """
        await self._transport.send(self._caller, UsageRecorded(resource=resource, quantity=quantity))

    async def set_flag(
        self,
        flag: str,
        *,
        actor: str,
        enabled: bool = True,
        rollout_per_mille: int = 1000,
        user_id: str | None = None,
        reason: str = "",
    ) -> None:
        """Set a flag for this tenant, or for one of its users."""
        scope = FlagScope.TENANT if user_id is None else FlagScope.USER
        await self._flag(flag, FlagAction.SET, scope, actor, reason, user_id, enabled, rollout_per_mille)

    async def kill_flag(self, flag: str, *, actor: str, reason: str) -> None:
        """Switch a flag off at once, whatever else is set; for the platform's client (tenant nil) for everyone."""
        scope = FlagScope.GLOBAL if self._caller.tenant == PLATFORM else FlagScope.TENANT
        await self._flag(flag, FlagAction.KILL, scope, actor, reason)

    async def revive_flag(self, flag: str, *, actor: str, reason: str) -> None:
        """Take a kill back; the flag's other settings hold again."""
        scope = FlagScope.GLOBAL if self._caller.tenant == PLATFORM else FlagScope.TENANT
        await self._flag(flag, FlagAction.REVIVE, scope, actor, reason)

    async def result(self, job_id: JobId, timeout_s: float = RESULT_TIMEOUT_S) -> JobFinished:
        """The result of any of the tenant's jobs; see :meth:`Job.result`."""
        return await Job(self._transport, self._caller, job_id).result(timeout_s)

    def results(self, start: Start = "now") -> AsyncIterator[JobFinished]:
        """The tenant's results in the order of the log, without end; only committed ones."""
        return self._transport.results(self._caller, start)

    async def _flag(
        self,
        flag: str,
        action: FlagAction,
        scope: FlagScope,
        actor: str,
        reason: str,
        user_id: str | None = None,
        enabled: bool = True,
        rollout_per_mille: int = 1000,
    ) -> None:
        command = FlagCommand(
            flag=flag,
            scope=scope,
            action=action,
            actor=actor,
            reason=reason,
            user_id=user_id,
            enabled=enabled,
            rollout_per_mille=rollout_per_mille,
        )
        await self._transport.send(self._caller, command)
