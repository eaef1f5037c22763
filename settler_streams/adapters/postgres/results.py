"""The result rows of one attempt at a job, written by the executor before it reports the attempt."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.failures import DRIVER_ERRORS, refuses_row
from settler_streams.errors import ConfigurationError, InvalidRequestError, RecordError
from settler_streams.ids import PLATFORM, JobId, uuid7

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Sequence

    from settler_streams.adapters.postgres.pool import TenantConnectionPool, Transaction
    from settler_streams.ids import TenantId

CHUNK_ROWS_MAX = 20_000
"""Rows of one statement. A few megabytes; larger chunks are not faster and hold more memory on both sides."""


@dataclass(frozen=True)
class MatchColumns:
    """Matches, a list per column. ``right_ids`` holds a JSON array of ids per match; the right amount is their sum."""

    kind: Sequence[str]
    left_id: Sequence[str]
    right_ids: Sequence[str]
    left_currency: Sequence[str]
    right_currency: Sequence[str]
    left_amount_minor: Sequence[int]
    right_amount_minor: Sequence[int]
    difference_minor: Sequence[int | None]


@dataclass(frozen=True)
class UnmatchedColumns:
    """Records without a partner, a list per column; ``side`` is left or right, ``record_no`` the place in the set."""

    side: Sequence[str]
    record_no: Sequence[int]
    record_id: Sequence[str | None]
    currency: Sequence[str | None]
    amount_minor: Sequence[int | None]
    record_date: Sequence[dt.date | None]
    reason: Sequence[str]
    detail: Sequence[str | None]


@dataclass(frozen=True)
class ReportRow:
    """The totals of one currency. On each side, matched plus unmatched equals the whole, in rows and minor units."""

    currency: str
    matches: int
    left_rows: int
    left_rows_matched: int
    left_rows_unmatched: int
    left_total_minor: int
    left_matched_minor: int
    left_unmatched_minor: int
    right_rows: int
    right_rows_matched: int
    right_rows_unmatched: int
    right_total_minor: int
    right_matched_minor: int
    right_unmatched_minor: int


@dataclass(frozen=True)
class RowsWritten:
    """How many rows went into each table."""

    matches: int
    unmatched: int
    reports: int


async def write_results(
    pool: TenantConnectionPool,
    tenant_id: TenantId,
    job_id: JobId,
    attempt: int,
    *,
    matches: Iterable[MatchColumns],
    unmatched: Iterable[UnmatchedColumns],
    report: Iterable[ReportRow],
) -> RowsWritten:
    """Replace the result rows of one attempt, in one transaction under the tenant's context.

    Writing an attempt again leaves exactly the rows of the last write. Chunks are taken one at a time, so memory holds
    one chunk, whatever the size of the result; each has at most :data:`CHUNK_ROWS_MAX` rows. Compute the result first:
    the server ends a transaction that pauses for 20 s between two chunks.

    Raises:
        RecordError: Postgres refuses a row (U+0000, a report that does not balance); nothing was changed.
        InvalidRequestError: a chunk is too large, its columns differ in length, or a value is a float; nothing
            was changed.
        UnavailableError: the server failed; write again.
    """
    key = (tenant_id, job_id, attempt)
    async with pool.tenant(tenant_id) as transaction:
        try:
            # The same attempt may still be running elsewhere, taken for dead: one of the two writes after the other.
            await transaction.execute(queries.LOCK_ATTEMPT, tenant_id, job_id, str(attempt))
            await transaction.execute(queries.DELETE_ATTEMPT, *key)
            match_rows = await _insert_chunks(transaction, queries.INSERT_MATCHES, key, matches)
            unmatched_rows = await _insert_chunks(transaction, queries.INSERT_UNMATCHED, key, unmatched)
            report_rows = [(*key, *astuple(row)) for row in report]
            for row in report_rows:
                _check_no_float(row)
            await transaction.executemany(queries.INSERT_REPORT, report_rows)
        except asyncpg.PostgresError as error:
            if refuses_row(error):
                raise RecordError(f"postgres-{error.sqlstate}", str(error)) from error
            raise
        except asyncpg.DataError as error:  # asyncpg's own: a value that has no form in the column's type
            raise RecordError("not-encodable", str(error)) from error
    return RowsWritten(match_rows, unmatched_rows, len(report_rows))


async def check_results_writable(pool: TenantConnectionPool) -> None:
    """Write what :func:`write_results` writes, of no tenant, and delete it in the same transaction.

    Whatever fails here is nobody's rows or schema: it fails for every job.

    Raises:
        ConfigurationError: the server does not take results: it is read-only, a table or a privilege is missing, or
            the login is refused.
        UnavailableError: the server failed.
    """
    key = (PLATFORM, JobId(uuid7(time.time_ns() // 1_000_000)), 1)
    try:
        async with pool.platform() as transaction:
            await _insert_chunks(transaction, queries.INSERT_MATCHES, key, [MatchColumns(*[()] * 8)])
            await _insert_chunks(transaction, queries.INSERT_UNMATCHED, key, [UnmatchedColumns(*[()] * 8)])
            await transaction.execute(queries.INSERT_REPORT, *key, *astuple(ReportRow("EUR", *[0] * 13)))
            await transaction.execute(queries.DELETE_ATTEMPT, *key)
    except DRIVER_ERRORS as error:
        raise ConfigurationError(f"PostgreSQL takes no results: {error!r}") from error


async def _insert_chunks(
    transaction: Transaction,
    insert: str,
    key: tuple[TenantId, JobId, int],
    chunks: Iterable[MatchColumns] | Iterable[UnmatchedColumns],
) -> int:
    """Insert chunk after chunk; rows are numbered from 1 through all of them."""
    written = 0
    for chunk in chunks:
        columns: list[Sequence[object]] = list(vars(chunk).values())
        rows = len(columns[0])
        _check_chunk(columns)
        await transaction.execute(insert, *key, written, *columns)
        written += rows
    return written


def _check_chunk(columns: list[Sequence[object]]) -> None:
    lengths = [len(column) for column in columns]
    if max(lengths) > CHUNK_ROWS_MAX or min(lengths) != max(lengths):
        raise InvalidRequestError(f"columns of {lengths} rows: equal lengths, {CHUNK_ROWS_MAX} at most")
    for column in columns:
        _check_no_float(column)


def _check_no_float(values: Iterable[object]) -> None:
    """The driver would cut a float to an integer without a word; an amount in minor units is never one."""
    if float in set(map(type, values)):
        raise InvalidRequestError("a float among the result's columns; amounts are integers of minor units")
