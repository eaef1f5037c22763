"""Result rows: one attempt is written as a whole, again and again the same, and shown only once accepted."""

from __future__ import annotations

import asyncio
import datetime as dt
import tracemalloc
import uuid
from dataclasses import replace

import pytest

from settler_streams.adapters.postgres.effects import JobResult
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.projection import PositionMove, init_position, write_batch
from settler_streams.adapters.postgres.results import (
    CHUNK_ROWS_MAX,
    MatchColumns,
    ReportRow,
    RowsWritten,
    UnmatchedColumns,
    check_results_writable,
    write_results,
)
from settler_streams.errors import ConfigurationError, InvalidRequestError, RecordError
from settler_streams.ids import PLATFORM, JobId, TenantId

pytestmark = pytest.mark.services


def matches(rows: int, prefix: str = "m") -> MatchColumns:
    ids = [f"{prefix}{i}" for i in range(rows)]
    return MatchColumns(
        ["one_to_many"] * rows, ids, [f'["{i}", "tail"]' for i in ids], ["EUR"] * rows, ["EUR"] * rows,
        [100] * rows, [99] * rows, [1] * rows,
    )  # fmt: skip


DAY = dt.date(2026, 2, 3)
UNMATCHED = UnmatchedColumns(
    ["left", "right"], [4, 9], ["l", None], ["EUR", None], [-5, None], [DAY, None],
    ["no_key_match", "invalid_row"], [None, "amount: not a number"],
)  # fmt: skip
REPORT = ReportRow("EUR", 3, 4, 3, 1, 305, 300, 5, 3, 3, 0, 297, 297, 0)


class Attempt:
    def __init__(self, pool):
        self.pool = pool
        self.tenant_id = TenantId(str(uuid.uuid4()))
        self.job_id = JobId(str(uuid.uuid4()))

    async def write(self, attempt=1, *, matched=None, unmatched=(UNMATCHED,), report=(REPORT,)) -> RowsWritten:
        chunks = [matches(3)] if matched is None else matched
        return await write_results(
            self.pool, self.tenant_id, self.job_id, attempt, matches=chunks, unmatched=unmatched, report=report
        )

    async def accept(self, attempt: int, version: int) -> None:
        topic_id = str(uuid.uuid4())
        await init_position(self.pool, "acceptance", topic_id, topic_id, 0)
        effect = JobResult(
            tenant_id=self.tenant_id, job_id=self.job_id, outcome="succeeded", accepted_attempt=attempt,
            finished_at_ms=0, source_version=version,
        )  # fmt: skip
        await write_batch(self.pool, PositionMove("acceptance", topic_id, topic_id, 0, 0, 1), [(effect,)])

    async def rows(self, table: str) -> list[tuple]:
        async with self.pool.tenant(self.tenant_id) as tx:
            return [tuple(row)[2:] for row in await tx.fetch(f"SELECT * FROM {table} ORDER BY 1, 2, 3, 4")]


@pytest.fixture
def job(pool):
    return Attempt(pool)


async def test_every_column_arrives(job):
    assert await job.write() == RowsWritten(matches=3, unmatched=2, reports=1)
    assert await job.rows("matches") == [
        (1, i + 1, "one_to_many", f"m{i}", [f"m{i}", "tail"], "EUR", "EUR", 100, 99, 1) for i in range(3)
    ]
    assert await job.rows("unmatched") == [
        (1, 1, "left", 4, "l", "EUR", -5, DAY, "no_key_match", None),
        (1, 2, "right", 9, None, None, None, None, "invalid_row", "amount: not a number"),
    ]
    assert await job.rows("reports") == [(1, "EUR", 3, 4, 3, 1, 305, 300, 5, 3, 3, 0, 297, 297, 0)]


async def test_chunks_are_numbered_through(job):
    await job.write(matched=[matches(2, "a"), matches(0), matches(3, "b")])
    assert [(row[1], row[3]) for row in await job.rows("matches")] == [
        (1, "a0"), (2, "a1"), (3, "b0"), (4, "b1"), (5, "b2"),
    ]  # fmt: skip


async def test_writing_an_attempt_again_leaves_the_last_write(job):
    await job.write(matched=[matches(5)])
    await job.write(2)
    assert await job.write(matched=[matches(1, "again")], unmatched=(), report=()) == RowsWritten(1, 0, 0)
    assert [row[:2] for row in await job.rows("matches")] == [(1, 1), (2, 1), (2, 2), (2, 3)]
    assert [row[0] for row in await job.rows("unmatched")] == [2, 2]
    assert [row[0] for row in await job.rows("reports")] == [2]


async def test_two_executors_of_the_same_attempt_do_not_mix(job):
    written = await asyncio.gather(*(job.write(matched=[matches(500, p), matches(500, p)]) for p in "abcd"))
    assert written == [RowsWritten(1000, 2, 1)] * 4
    rows = await job.rows("matches")
    assert len(rows) == 1000
    assert len({row[3][0] for row in rows}) == 1


async def test_readers_see_the_accepted_attempt_alone(job):
    views = ("accepted_matches", "accepted_unmatched", "accepted_reports")
    await job.write(1)
    await job.write(2, matched=[matches(1)])
    assert [await job.rows(view) for view in views] == [[], [], []]
    await job.accept(2, version=1)
    assert [{row[0] for row in await job.rows(view)} for view in views] == [{2}, {2}, {2}]
    assert len(await job.rows("accepted_matches")) == 1


async def test_readers_see_no_other_tenants_result(pool, job):
    await job.write(1)
    await job.accept(1, version=1)
    other = Attempt(pool)
    assert [await other.rows(f"accepted_{table}") for table in ("matches", "unmatched", "reports")] == [[], [], []]


@pytest.mark.parametrize(
    "bad",
    [
        {"matched": [matches(3), replace(matches(1), left_id=["a\0b"])]},
        {"matched": [replace(matches(1), left_amount_minor=[2**63])]},
        {"matched": [replace(matches(1), left_currency=["euro"])]},
        {"report": [replace(REPORT, left_unmatched_minor=6)]},
        {"report": [replace(REPORT, right_rows_matched=2)]},
    ],
    ids=["null-character", "beyond-64-bits", "currency", "unbalanced-minor-units", "unbalanced-rows"],
)
async def test_a_row_that_is_refused_leaves_the_former_write(job, bad):
    await job.write()
    before = [await job.rows(table) for table in ("matches", "unmatched", "reports")]
    with pytest.raises(RecordError):
        await job.write(**bad)
    assert [await job.rows(table) for table in ("matches", "unmatched", "reports")] == before


@pytest.mark.parametrize("bad", [matches(CHUNK_ROWS_MAX + 1), replace(matches(2), kind=["exact"])])
async def test_a_chunk_out_of_shape_is_refused(job, bad):
    with pytest.raises(InvalidRequestError, match="equal lengths"):
        await job.write(matched=[bad])


@pytest.mark.parametrize(
    "bad",
    [
        {"matched": [replace(matches(2), left_amount_minor=[1, 1.5])]},
        {"unmatched": [replace(UNMATCHED, amount_minor=[1.0, 2])]},
        {"report": [replace(REPORT, left_total_minor=305.0)]},
    ],
    ids=["matches", "unmatched", "report"],
)
async def test_an_amount_that_is_a_float_is_refused(job, bad):
    with pytest.raises(InvalidRequestError, match="float"):
        await job.write(**bad)


async def test_a_large_result_is_streamed(job):
    rows, chunk = 100_000, 10_000
    tracemalloc.start()
    try:
        written = await job.write(matched=(matches(chunk) for _ in range(rows // chunk)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written.matches == rows
    # One chunk and its encoded form take about 5 MB; all ten would take more than 20.
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("breaks", "mends", "told"),
    [
        ("ALTER DATABASE {} SET default_transaction_read_only = on", "ALTER DATABASE {} RESET ALL", "read-only"),
        *(
            (f"REVOKE {right} ON {table} FROM settler_services", f"GRANT {right} ON {table} TO settler_services", table)
            for table in ("matches", "unmatched", "reports")
            for right in ("INSERT", "DELETE")
        ),
        ("ALTER TABLE reports RENAME TO gone", "ALTER TABLE gone RENAME TO reports", "does not exist"),
    ],
)
async def test_a_database_that_takes_nobodys_results_is_told_from_one_that_does(
    database_settings, owner, breaks, mends, told
):
    """As after a failover to a standby, or with grants or migrations that are missing."""
    await owner.execute(breaks.format(database_settings.db_name))
    pool = await TenantConnectionPool.open(database_settings)
    try:
        with pytest.raises(ConfigurationError, match=told):
            await check_results_writable(pool)
    finally:
        await pool.close()
        await owner.execute(mends.format(database_settings.db_name))
    pool = await TenantConnectionPool.open(database_settings)
    try:
        await check_results_writable(pool)
    finally:
        await pool.close()
    for table in ("matches", "unmatched", "reports"):
        assert await owner.fetchval(f"SELECT count(*) FROM {table} WHERE tenant_id = $1", PLATFORM) == 0
