"""What a client needs of a transport. Kafka and HTTP both offer it; a client does not know which one it has."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from settler_streams.errors import InvalidRequestError
from settler_streams.events import (
    FlagCommand,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobRequested,
    UsageRecorded,
)
from settler_streams.ids import JobId, TenantId, is_uuid7

Start: TypeAlias = Literal["now", "beginning"] | dt.datetime
"""Where a subscription begins: with what comes next, with the oldest kept result, or at a time (UTC, aware)."""

Command: TypeAlias = JobCancelRequested | UsageRecorded | FlagCommand


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a client acts. ``root`` is the tenant itself unless it has a parent."""

    tenant: TenantId
    root: TenantId


LOOK_BACK = dt.timedelta(minutes=1)
"""A job's answer is looked for from its id's own time on, less this much for clocks that differ."""


def answers_since(job_id: JobId) -> Start:
    """Where to begin looking for the answer of a job: at the time in its id, if it is a UUIDv7."""
    job = uuid.UUID(job_id)
    if job.version != 7:
        return "beginning"
    return dt.datetime.fromtimestamp((job.int >> 80) / 1000, dt.UTC) - LOOK_BACK


def check_job_id(job_id: JobId) -> None:
    """The gateway would run the job under another id, and an agent would drop what is no UUID at all.

    Raises:
        InvalidRequestError: it is not an id that a new job may have.
    """
    if not is_uuid7(job_id):
        raise InvalidRequestError(f"a job's id is a UUIDv7 in lower case with four hyphens, not {job_id[:100]!r}")


class Transport(Protocol):
    """One connection to the platform, shared by the clients of any number of tenants."""

    async def start(self) -> None:
        """Connect.

        Raises:
            UnavailableError: the platform did not answer in time.
        """
        ...

    async def stop(self) -> None:
        """Deliver what was accepted, then disconnect. Bounded."""
        ...

    async def submit(self, caller: Caller, job_id: JobId, request: JobRequested) -> None:
        """Hand over a job request; returns when the platform has stored it.

        Raises:
            InvalidRequestError: ``job_id`` is no canonical UUIDv7, or the request is too large or breaks the schema.
            UnavailableError: it is unknown whether it was stored; submitting the same ``job_id`` again is safe.
        """
        ...

    async def send(self, caller: Caller, command: Command) -> None:
        """Hand over anything but a job request; returns when the platform has stored it."""
        ...

    async def decision(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobDecided:
        """Admission's decision on a job.

        Raises:
            UnavailableError: there is none yet after ``timeout_s``.
        """
        ...

    async def result(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobFinished:
        """The result of an admitted job.

        Raises:
            UnavailableError: there is none yet after ``timeout_s``.
        """
        ...

    def results(self, caller: Caller, start: Start) -> AsyncIterator[JobFinished]:
        """The tenant's results in the order of the log, without end."""
        ...
