"""Retention: what is past a tenant's own period goes, whole; nothing else can be deleted, by whatever statement."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
import uuid

import asyncpg
import pytest

from settler_streams.adapters.postgres import queries
from settler_streams.dev.bench.row_security import plan
from settler_streams.errors import InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.services import RetentionKind, RetentionService, RetentionSweeper, Swept, retention

pytestmark = pytest.mark.services

EXECUTIONS, USAGE, AUDIT = RetentionKind
RESULT_TABLES = ("executions", "matches", "unmatched", "reports")
TABLES = ("jobs", *RESULT_TABLES, "tenant_usage", "tenant_signals", "audit_logs")


@pytest.fixture
def service(pool):
    return RetentionService(pool)


@pytest.fixture
def deleted(service, monkeypatch):
    """How many rows each transaction of a sweep has deleted; one holds 100 result rows."""
    counted = []
    delete = service._delete

    async def watched(tenant_id: TenantId, query: str, *bounds: int) -> int:
        counted.append(await delete(tenant_id, query, *bounds))
        return counted[-1]

    monkeypatch.setattr(service, "_delete", watched)
    monkeypatch.setattr(retention, "BATCH_ROWS_MAX", 100)
    return counted


async def add_job(owner, tenant: TenantId, *, ended_days_ago: float | None, rows: int = 2) -> uuid.UUID:
    """A job with one attempt and ``rows`` matches and as many unmatched records."""
    job = uuid.uuid4()
    ended = None if ended_days_ago is None else days_ago(ended_days_ago)
    await owner.execute(
        """INSERT INTO jobs (tenant_id, job_id, decision, decision_version, outcome, finished_at, result_version,
                             accepted_attempt)
           VALUES ($1, $2, 'admitted', 1, $3, $4, $5, 1)""",
        tenant, job, "succeeded" if ended else None, ended, 2 if ended else None,
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO executions (tenant_id, job_id, attempt, executor, status, finished_at, source_version)
           VALUES ($1, $2, 1, 'e', 'succeeded', $3, 1)""",
        tenant, job, ended,
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO matches (tenant_id, job_id, attempt, match_no, kind, left_id, right_ids, left_currency,
                                right_currency, left_amount_minor, right_amount_minor)
           SELECT $1, $2, 1, n, 'exact', 'l', ARRAY['r'], 'EUR', 'EUR', 1, 1 FROM generate_series(1, $3::int) AS n""",
        tenant, job, rows,
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO unmatched (tenant_id, job_id, attempt, row_no, side, record_no, reason)
           SELECT $1, $2, 1, n, 'left', n, 'missing' FROM generate_series(1, $3::int) AS n""",
        tenant, job, rows,
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO reports (tenant_id, job_id, attempt, currency, matches, left_rows, left_rows_matched,
                                left_rows_unmatched, left_total_minor, left_matched_minor, left_unmatched_minor,
                                right_rows, right_rows_matched, right_rows_unmatched, right_total_minor,
                                right_matched_minor, right_unmatched_minor)
           VALUES ($1, $2, 1, 'EUR', $3::bigint, 2 * $3, $3, $3, 0, 0, 0, $3, $3, 0, 0, 0, 0)""",
        tenant, job, rows,
    )  # fmt: skip
    return job


async def add_decision(
    owner, tenant: TenantId, decision: str, *, decided_days_ago: float, ended_days_ago: float | None = None
) -> uuid.UUID:
    """A job of which admission alone has told; or that has a result too, as one whose request came again later."""
    job = uuid.uuid4()
    ended = None if ended_days_ago is None else days_ago(ended_days_ago)
    await owner.execute(
        """INSERT INTO jobs (tenant_id, job_id, decision, decided_at, decision_version, outcome, finished_at,
                             result_version)
           VALUES ($1, $2, $3, $4, 1, $5, $6, $7)""",
        tenant, job, decision, days_ago(decided_days_ago), "failed" if ended else None, ended, 2 if ended else None,
    )  # fmt: skip
    return job


async def add_rest(owner, tenant: TenantId, age_days: float) -> None:
    """Usage, a signal and an audit entry of that age."""
    await owner.execute(
        """INSERT INTO tenant_usage (tenant_id, resource, window_start, window_seconds, quantity, source_version)
           VALUES ($1, 'requests', $2, 60, 1, 1)""",
        tenant, days_ago(age_days),
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO tenant_signals (tenant_id, signal_id, kind, resource, signalled_at, source_version)
           VALUES ($1, $2, 'noisy', 'requests', $3, 1)""",
        tenant, uuid.uuid4(), days_ago(age_days),
    )  # fmt: skip
    await owner.execute(
        """INSERT INTO audit_logs (tenant_id, id, actor, action, subject, recorded_at)
           VALUES ($1, $2, 'a', 'b', 'c', $3)""",
        tenant, uuid.uuid4(), days_ago(age_days),
    )  # fmt: skip


def days_ago(days: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) - dt.timedelta(days=days)


async def counts(owner, tenant: TenantId) -> dict[str, int]:
    return {
        table: await owner.fetchval(f"SELECT count(*) FROM {table} WHERE tenant_id = $1", tenant) for table in TABLES
    }


async def audited(owner, tenant: TenantId) -> list[tuple[str, dict, dict]]:
    rows = await owner.fetch(
        """SELECT actor, before, after FROM audit_logs
           WHERE tenant_id = $1 AND action = 'tenant.retention-changed' ORDER BY id""",
        tenant,
    )
    return [(row["actor"], json.loads(row["before"]), json.loads(row["after"])) for row in rows]


async def test_a_tenant_keeps_everything_until_it_says_otherwise(service, owner, create_tenant):
    tenant = await create_tenant()
    await add_job(owner, tenant, ended_days_ago=5_000)
    await add_rest(owner, tenant, 5_000)
    before = await counts(owner, tenant)
    assert await service.get(tenant) == dict.fromkeys(RetentionKind)
    assert await service.sweep(tenant) == Swept()
    assert await counts(owner, tenant) == before


async def test_what_is_past_its_period_goes_with_all_that_belongs_to_it(service, owner, create_tenant):
    tenant = await create_tenant()
    gone, kept, running = [await add_job(owner, tenant, ended_days_ago=days) for days in (31, 29, None)]
    await add_rest(owner, tenant, 401)
    await add_rest(owner, tenant, 399)
    await service.change(tenant, {EXECUTIONS: 30, USAGE: 400, AUDIT: 400}, actor="ann")
    assert await service.sweep(tenant) == Swept(jobs=1, usage=2, audit=1)
    for table in ("jobs", *RESULT_TABLES):
        left = {row[0] for row in await owner.fetch(f"SELECT job_id FROM {table} WHERE tenant_id = $1", tenant)}
        assert (left, gone in left) == ({kept, running}, False), table
    left = await counts(owner, tenant)
    assert (left["tenant_usage"], left["tenant_signals"], left["audit_logs"]) == (1, 1, 2), "the change is audited too"
    assert await service.sweep(tenant) == Swept(), "a second sweep finds nothing"


async def test_a_rejected_job_is_kept_from_its_decision_on(service, owner, pool, create_tenant):
    tenant = await create_tenant()
    await add_decision(owner, tenant, "rejected", decided_days_ago=31)
    kept = {
        await add_decision(owner, tenant, "rejected", decided_days_ago=29),
        await add_decision(owner, tenant, "admitted", decided_days_ago=5_000),  # it has not ended
        await add_decision(owner, tenant, "rejected", decided_days_ago=31, ended_days_ago=29),
    }
    await add_decision(owner, tenant, "rejected", decided_days_ago=29, ended_days_ago=31)
    await service.change(tenant, {EXECUTIONS: 30})
    assert await service.sweep(tenant) == Swept(jobs=2)
    assert {row[0] for row in await owner.fetch("SELECT job_id FROM jobs WHERE tenant_id = $1", tenant)} == kept
    async with pool.janitor(tenant) as tx:
        assert await tx.execute("DELETE FROM jobs") == "DELETE 0"


async def test_usage_is_as_old_as_the_end_of_its_window(service, owner, pool, create_tenant):
    tenant, month_s = await create_tenant(), 30 * 86_400
    for began_days_ago in (20, 36, 38):
        await owner.execute(
            """INSERT INTO tenant_usage (tenant_id, resource, window_start, window_seconds, quantity, source_version)
               VALUES ($1, 'monthly_reconciliations', $2, $3, 1, 1)""",
            tenant, days_ago(began_days_ago), month_s,
        )  # fmt: skip
    await service.change(tenant, {USAGE: 7})
    assert await service.sweep(tenant) == Swept(usage=1)
    async with pool.janitor(tenant) as tx:
        assert await tx.execute("DELETE FROM tenant_usage") == "DELETE 0"
    assert (await counts(owner, tenant))["tenant_usage"] == 2, "the month that is being counted, and the last one"


async def test_the_sweep_finds_ended_jobs_and_their_size_by_index(service, owner, pool, create_tenant):
    tenant = await create_tenant()
    await owner.execute(
        """INSERT INTO jobs (tenant_id, job_id, decision, decided_at, decision_version)
           SELECT $1, gen_random_uuid(), CASE n % 2 WHEN 0 THEN 'rejected' ELSE 'admitted' END,
                  now() - make_interval(days => n), 1 FROM generate_series(1, 5000) AS n""",
        tenant,
    )
    await owner.execute("ANALYZE jobs")
    await service.change(tenant, {EXECUTIONS: 4_899})
    async with pool.janitor(tenant) as tx:
        nodes = await plan(tx, queries.DELETE_OLD_JOBS, (tenant, 500, 50_000))
    assert any(
        node.get("Index Name") == "jobs_by_end"
        and {"tenant_id", "decided_at"} <= set(re.findall(r"\w+", node["Index Cond"]))
        for node in nodes
    ), nodes
    for key in ("matches_pkey", "unmatched_pkey"):
        last = [node for node in nodes if node.get("Index Name") == key and node.get("Scan Direction") == "Backward"]
        read = {frozenset(re.findall("tenant_id|job_id|attempt =", node["Index Cond"])) for node in last}
        assert read == {frozenset({"tenant_id", "job_id"}), frozenset({"tenant_id", "job_id", "attempt ="})}, nodes
    assert await service.sweep(tenant) == Swept(jobs=51)


async def test_another_tenants_rows_are_not_touched(service, owner, create_tenant):
    tenant, other = await create_tenant(), await create_tenant()
    for each in (tenant, other):
        await add_job(owner, each, ended_days_ago=1_000)
        await add_rest(owner, each, 1_000)
    before = await counts(owner, other)
    await service.change(tenant, {EXECUTIONS: 1, USAGE: 1, AUDIT: 90})
    assert await service.sweep(tenant) == Swept(jobs=1, usage=2, audit=1)
    assert await service.sweep(other) == Swept()
    assert await counts(owner, other) == before


async def test_many_jobs_go_in_transactions_of_bounded_size_and_a_large_one_alone(
    service, owner, create_tenant, deleted
):
    tenant = await create_tenant()
    for rows in (3, 3, 500, 3):
        await add_job(owner, tenant, ended_days_ago=100 + rows / 1_000, rows=rows)
    await service.change(tenant, {EXECUTIONS: 1})
    assert (await service.sweep(tenant)).jobs == 4
    assert deleted[:3] == [1, 3, 0], "the large one is the oldest; the others fit together"
    left = await counts(owner, tenant)
    assert [table for table in ("jobs", *RESULT_TABLES) if left[table]] == []


@pytest.mark.parametrize(("table", "other"), [("matches", "unmatched"), ("unmatched", "matches")])
@pytest.mark.parametrize(("given_up", "transactions"), [((), [2, 2, 0]), ((3,), [1, 1, 1, 1, 0])])
async def test_result_rows_count_that_no_report_tells_of(
    service, owner, create_tenant, deleted, table, other, given_up, transactions
):
    """Invalid records, of which there may be no others; and those of attempts that were given up."""
    tenant = await create_tenant()
    for _ in range(4):
        await add_job(owner, tenant, ended_days_ago=100, rows=40)
    for without in (other, "reports"):
        await owner.execute(f"DELETE FROM {without} WHERE tenant_id = $1", tenant)
    for attempt in given_up:
        await owner.execute(
            f"""INSERT INTO {table}
                SELECT (jsonb_populate_record(x, jsonb_build_object('attempt', $2::int))).* FROM {table} x
                WHERE tenant_id = $1 AND attempt = 1""",
            tenant, attempt,
        )  # fmt: skip
    await service.change(tenant, {EXECUTIONS: 1})
    assert (await service.sweep(tenant)).jobs == 4
    assert deleted[: len(transactions)] == transactions
    assert (await counts(owner, tenant))[table] == 0


async def test_a_tenant_that_cannot_be_swept_keeps_none_behind_it_waiting(service, owner, create_tenant, monkeypatch):
    tenants = [await create_tenant() for _ in range(7)]
    for tenant in tenants:
        await add_job(owner, tenant, ended_days_ago=10)
        await service.change(tenant, {EXECUTIONS: 1})
    broken = {tenants[place] for place in (0, 2, 3)}
    sweep, last_swept = service.sweep, asyncio.Event()

    async def some_fail(tenant_id: TenantId) -> Swept:
        if tenant_id in broken:
            raise UnavailableError("canceling statement due to statement timeout")
        swept = await sweep(tenant_id)
        if tenant_id == tenants[-1]:
            last_swept.set()
        return swept

    monkeypatch.setattr(service, "sweep", some_fail)
    sweeper = RetentionSweeper(service, tenants)
    await sweeper.start()
    try:
        async with asyncio.timeout(10):
            await last_swept.wait()
    finally:
        await sweeper.stop()
    left = [tenant for tenant in tenants if (await counts(owner, tenant))["jobs"]]
    assert left == [tenant for tenant in tenants if tenant in broken]


async def test_a_database_that_is_away_is_asked_for_three_tenants_only(service, monkeypatch):
    tenants, asked = [TenantId(str(uuid.uuid4())) for _ in range(9)], []

    async def away(tenant_id: TenantId) -> Swept:
        asked.append(tenant_id)
        if tenant_id == tenants[2]:
            return Swept(jobs=1)
        raise UnavailableError("no database connection")

    monkeypatch.setattr(service, "sweep", away)
    assert await service.sweep_all(tenants) == (Swept(jobs=1), [*tenants[:2], *tenants[3:]])
    assert asked == tenants[:6]


async def test_sweeps_at_the_same_time_delete_each_row_once(service, owner, create_tenant):
    tenant = await create_tenant()
    for _ in range(40):
        await add_job(owner, tenant, ended_days_ago=10)
    await service.change(tenant, {EXECUTIONS: 1})
    swept = await asyncio.gather(*(service.sweep(tenant) for _ in range(4)))
    total = sum(swept, Swept()).jobs
    total += (await service.sweep(tenant)).jobs
    assert (total, (await counts(owner, tenant))["matches"]) == (40, 0)


async def test_changes_are_audited_once_and_leave_the_other_periods(service, owner, create_tenant):
    tenant = await create_tenant()
    assert await service.change(tenant, {USAGE: 7}, actor="ann") == {EXECUTIONS: None, USAGE: 7, AUDIT: None}
    assert await service.change(tenant, {AUDIT: 365}, actor="bob") == {EXECUTIONS: None, USAGE: 7, AUDIT: 365}
    assert await service.change(tenant, {AUDIT: 365}, actor="bob") == await service.get(tenant)
    assert await service.change(tenant, {USAGE: None}, actor="ann") == {EXECUTIONS: None, USAGE: None, AUDIT: 365}
    nothing = {"executions": None, "usage": None, "audit": None}
    assert await audited(owner, tenant) == [
        ("ann", nothing, nothing | {"usage": 7}),
        ("bob", nothing | {"usage": 7}, nothing | {"usage": 7, "audit": 365}),
        ("ann", nothing | {"usage": 7, "audit": 365}, nothing | {"audit": 365}),
    ]


@pytest.mark.parametrize("periods", [{USAGE: 0}, {AUDIT: 89}, {EXECUTIONS: 36_501}, {USAGE: -1}])
async def test_a_period_out_of_range_is_refused_and_changes_nothing(service, create_tenant, periods):
    tenant = await create_tenant()
    with pytest.raises(InvalidRequestError, match="can be kept for"):
        await service.change(tenant, {EXECUTIONS: 5} | periods)
    assert await service.get(tenant) == dict.fromkeys(RetentionKind)


async def test_a_tenant_that_does_not_exist_has_no_retention(service):
    nobody = TenantId(str(uuid.uuid4()))
    for call in (service.get(nobody), service.change(nobody, {USAGE: 1}), service.get(PLATFORM)):
        with pytest.raises(NotFoundError, match="no tenant"):
            await call


@pytest.mark.parametrize("table", ["jobs", "executions", "tenant_usage", "tenant_signals", "audit_logs"])
async def test_the_janitor_cannot_delete_what_is_not_past_its_period(service, owner, pool, create_tenant, table):
    tenant = await create_tenant()
    await add_job(owner, tenant, ended_days_ago=50)
    await add_decision(owner, tenant, "rejected", decided_days_ago=50)
    await add_decision(owner, tenant, "admitted", decided_days_ago=5_000)
    await add_rest(owner, tenant, 50)
    await service.change(tenant, {EXECUTIONS: 51, USAGE: 51, AUDIT: 90})
    before = await counts(owner, tenant)
    async with pool.janitor(tenant) as tx:
        assert await tx.execute(f"DELETE FROM {table}") == "DELETE 0"
    assert await counts(owner, tenant) == before


@pytest.mark.parametrize("table", [table for table in TABLES if table not in ("matches", "unmatched", "reports")])
async def test_a_service_that_is_not_the_janitor_cannot_delete_the_past(owner, pool, create_tenant, table):
    """But for an attempt's rows, which an executor that repeats it replaces."""
    tenant = await create_tenant()
    await add_job(owner, tenant, ended_days_ago=5_000)
    await add_rest(owner, tenant, 5_000)
    async with pool.tenant(tenant) as tx:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await tx.execute(f"DELETE FROM {table}")


@pytest.mark.parametrize("statement", [
    "UPDATE jobs SET kind = 'x'", "INSERT INTO tenant_retention SELECT tenant_id, 'audit', 90 FROM jobs",
    "UPDATE tenant_retention SET keep_days = 1", "DELETE FROM tenant_retention", "SELECT * FROM users",
    "SELECT * FROM api_keys", "TRUNCATE audit_logs", "DELETE FROM outbox",
])  # fmt: skip
async def test_the_janitor_can_do_nothing_else(pool, create_tenant, statement):
    tenant = await create_tenant()
    async with pool.janitor(tenant) as tx:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await tx.execute(statement)
