"""Batches of the recorder with every kind of effect: A's the same everywhere, those of others by their database."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import asyncpg
import msgspec

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.effects import (
    AuditEntry,
    DeadLetter,
    Effect,
    Execution,
    Flag,
    JobDecision,
    JobResult,
    QuotaUsage,
    Signal,
    Usage,
    WebhookEvent,
)
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.ids import PLATFORM, TenantId
from tests.isolation.interference import readable
from tests.isolation.probe import A
from tests.isolation.twins import answers

C: Final = "0ccccccc-0000-4000-8000-00000000000c"
"""Has no rows but those of a batch, in which it stands before A; B stands behind."""

_THEN_MS: Final = 86_400_000
"""When everything in an effect happens, in 1970: a time of this century is the clock's."""
_CLOCK: Final = re.compile(r"20\d\d-\d\d-\d\d[ T][\d:.]+\+00")

REFUSED: Final[dict[str, dict[str, object]]] = {
    "job_decision": {"decision": "perhaps"}, "job_result": {"outcome": "perhaps"}, "execution": {"attempt": 0},
    "usage": {"window_seconds": 0}, "quota_usage": {"used": -1}, "signal": {"kind": "loud"},
    "flag": {"scope": "everywhere"}, "audit_entry": {"recorded_at_ms": 2**62}, "dead_letter": {"attempts": 0},
    "webhook_event": {"event_id": "x"},
}  # fmt: skip
"""Of each kind of effect, a value that Postgres refuses."""


class Names(NamedTuple):
    """What the keys of a tenant's effects are made of: an id, and where a dead letter lies."""

    row_id: str
    letter_offset: int


class After(NamedTuple):
    """What the recorder was told of a batch, and what A sees of every table afterwards."""

    told: str
    seen: list[str]


def effects(tenant_id: str, names: Names, mark: str, version: int) -> dict[str, Effect]:
    """One effect of each kind; ``mark`` stands in every text that is free, ``version`` in every quantity."""
    tenant, row_id, offset = TenantId(tenant_id), *names
    made: tuple[Effect, ...] = (
        JobDecision(tenant_id=tenant, job_id=row_id, kind=mark, priority="low", decision="rejected", reason=mark,
                    current_usage=version, limit_value=version, retry_after_ms=version, requested_at_ms=_THEN_MS,
                    decided_at_ms=_THEN_MS, source_version=version),
        JobResult(tenant_id=tenant, job_id=row_id, outcome="failed", accepted_attempt=1, finished_at_ms=_THEN_MS,
                  source_version=version),
        Execution(tenant_id=tenant, job_id=row_id, attempt=1, executor=mark, status="failed", source_version=version,
                  started_at_ms=_THEN_MS, finished_at_ms=_THEN_MS, worker_us=version, error=mark),
        Usage(tenant_id=tenant, resource=row_id, window_start_ms=0, window_seconds=60, quantity=version,
              source_version=version),
        QuotaUsage(tenant_id=tenant, quota_type=row_id, used=version, reserved=version, limit_value=version,
                   source_version=version),
        Signal(tenant_id=tenant, signal_id=row_id, kind="quiet", resource=mark, detail={"by": mark},
               signalled_at_ms=_THEN_MS, source_version=version),
        Flag(tenant_id=tenant, flag=row_id, scope="tenant", enabled=False, definition={"by": mark}, changed_by=mark,
             changed_at_ms=_THEN_MS, source_version=version),
        AuditEntry(tenant_id=tenant, id=row_id, actor=mark, action=mark, subject=mark, recorded_at_ms=_THEN_MS),
        DeadLetter(tenant_id=tenant, letter_partition=0, letter_offset=offset, role=mark, reason=mark, detail=mark,
                   origin_topic=mark, origin_partition=0, origin_offset=0, attempts=1, refused_at_ms=_THEN_MS),
        WebhookEvent(tenant_id=tenant, event_id=row_id, event_type=mark, body=mark, appended_at_ms=_THEN_MS,
                     source_version=version),
    )  # fmt: skip
    return {each.KIND: each for each in made}


def batch_of(given: Sequence[Mapping[str, Effect]], kinds: Sequence[str]) -> str:
    """The effects of ``kinds``, as the recorder sends them."""
    batch: dict[str, dict[str, list[Effect]]] = {}
    for each in given:
        for kind in kinds:
            batch.setdefault(each[kind].tenant_id, {}).setdefault(kind, []).append(each[kind])
    return msgspec.json.encode(batch).decode()


async def after(connection: asyncpg.Connection, batch: str, *, seen_by: str = A, apart: Sequence[str] = ()) -> After:
    """Run a batch as the recorder does, in the platform's context, and undo it.

    Args:
        connection: a session of the services' login, in a transaction, before and afterwards in A's context.
        batch: what ``batch_of`` returns.
        seen_by: the tenant that looks.
        apart: tenants that get a schema of their own before.
    """
    await connection.execute("SAVEPOINT whole")
    try:
        for tenant_id in apart:
            await TenantContext.set(connection, TenantId(tenant_id))
            await connection.execute(queries.CREATE_TENANT_SCHEMA)
        await TenantContext.set(connection, PLATFORM)
        told = await _told(connection, batch)
        await TenantContext.set(connection, TenantId(seen_by))
        return After(told, await _seen(connection))
    finally:
        await connection.execute("ROLLBACK TO whole")


async def _told(connection: asyncpg.Connection, batch: str) -> str:
    await connection.execute("SAVEPOINT batch")
    try:
        await connection.execute(queries.PROJECT_BATCH, batch)
    except asyncpg.PostgresError as error:
        await connection.execute("ROLLBACK TO batch")
        said = (error.sqlstate, error, error.detail, error.hint, error.constraint_name)
        return _CLOCK.sub("now", " | ".join(map(str, ("ERROR", *said))))
    return "written"


async def _seen(connection: asyncpg.Connection) -> list[str]:
    """Every row that the connection's tenant sees, along its path and by name in the shared schema."""
    tables = [table.name for table in await readable(connection)]
    heard = await answers(connection, [f"SELECT * FROM {place}{name}" for place in ("", "public.") for name in tables])
    return [_CLOCK.sub("now", f"{name}: {rows}") for name, rows in zip(tables * 2, heard, strict=True)]
