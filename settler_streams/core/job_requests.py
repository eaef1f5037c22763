"""One job request by itself: its rules, what can be seen of its paths, and how a decision on it is put."""

from __future__ import annotations

import msgspec

from settler_streams.core.fold import Record
from settler_streams.core.matching import Rules
from settler_streams.core.quotas import Refusal
from settler_streams.errors import InvalidRequestError, RecordError
from settler_streams.events import FileRecords, JobDecided, JobRequested, RejectReason


def rules_of(request: JobRequested) -> Rules:
    """The rules to match by. The SDK and the gateway ask as well, so a job that would fail by them is not charged.

    Raises:
        InvalidRequestError: the schema allows the rules, and yet nothing can be matched by them: a column that cannot
            be a key, or is one twice; currencies that may differ, without a key.
    """
    try:
        # By attribute: encoded, a rule at the event's default is left out, and the default here is another.
        return msgspec.convert(request.rules, Rules, from_attributes=True)
    except msgspec.ValidationError as error:  # built in this process, not decoded
        raise InvalidRequestError(f"rules: {error}") from error


def check_paths(request: JobRequested) -> None:
    """What can be seen of a path without opening it. Where links lead, the executor sees."""
    for records in (request.left, request.right):
        if not isinstance(records, FileRecords):
            continue
        path = records.path
        if path.startswith("/") or (".." in path and ".." in path.split("/")):
            raise RecordError("outside-tenant", f"the path {path!r} leaves the tenant's directory")


def admission_of(record: Record, request: JobRequested, now_ms: int) -> JobDecided:
    """The answer to the request in ``record``: admitted."""
    return JobDecided(
        job_id=record.event.id,
        admitted=True,
        kind=request.kind,
        priority=request.priority,
        requested_at_ms=now_ms,
        decided_at_ms=now_ms,
    )


def refusal_of(record: Record, request: JobRequested, refusal: RejectReason | Refusal, now_ms: int) -> JobDecided:
    """The answer to the request in ``record``: refused, why, and what would help."""
    reason, detail = (refusal.reason, refusal) if isinstance(refusal, Refusal) else (refusal, None)
    return JobDecided(
        job_id=record.event.id,
        admitted=False,
        kind=request.kind,
        priority=request.priority,
        requested_at_ms=now_ms,
        decided_at_ms=now_ms,
        reason=reason,
        quota=detail.quota if detail else None,
        current=detail.current if detail else None,
        limit=detail.limit if detail else None,
        retry_after_ms=detail.retry_after_ms if detail else None,
    )
