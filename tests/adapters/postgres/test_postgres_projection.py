"""The recorder's writes: once, in any order, and past every poison record."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import uuid

import pytest

from settler_streams.adapters.postgres.effects import (
    AuditEntry,
    Effect,
    Execution,
    Flag,
    JobDecision,
    JobResult,
    QuotaUsage,
    Signal,
    Usage,
)
from settler_streams.adapters.postgres.projection import (
    Position,
    PositionMove,
    bisect,
    init_position,
    read_positions,
    write_batch,
)
from settler_streams.errors import FencedError, RecordError, StateError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId

pytestmark = pytest.mark.services

T0_MS = 1_764_000_000_123


def new_id() -> str:
    return str(uuid.uuid4())


class Log:
    """One partition as a consumer sees it: each batch moves the position by the number of its records."""

    def __init__(self, pool):
        self.pool = pool
        self.consumer = f"recorder-{uuid.uuid4().hex[:8]}"
        self.topic_id = new_id()
        self.next_offset = 0

    async def open(self):
        await init_position(self.pool, self.consumer, self.topic_id, "t", 3)
        return self

    def move(self, records: int) -> PositionMove:
        old, self.next_offset = self.next_offset, self.next_offset + records
        return PositionMove(self.consumer, self.topic_id, "t", 3, old, self.next_offset)

    async def write(self, *effects: Effect) -> None:
        await write_batch(self.pool, self.move(len(effects)), [(effect,) for effect in effects])

    async def stored(self) -> int:
        return (await read_positions(self.pool, self.consumer))[0].next_offset


@pytest.fixture
async def log(pool):
    return await Log(pool).open()


def decision(tenant_id, job_id, version=0, **other):
    given = {
        "kind": "reconcile", "priority": "normal", "decision": "admitted", "requested_at_ms": T0_MS,
        "decided_at_ms": T0_MS + 1, "source_version": version,
    } | other  # fmt: skip
    return JobDecision(tenant_id=TenantId(tenant_id), job_id=job_id, **given)


def result(tenant_id, job_id, version=0, **other):
    given = {"outcome": "succeeded", "accepted_attempt": 2, "finished_at_ms": T0_MS + 2, "source_version": version}
    return JobResult(tenant_id=TenantId(tenant_id), job_id=job_id, **given | other)


def usage(tenant_id, quantity, version, **other):
    given = {"resource": "jobs", "window_start_ms": T0_MS, "window_seconds": 60} | other
    return Usage(tenant_id=TenantId(tenant_id), quantity=quantity, source_version=version, **given)


async def job(pool, tenant_id, job_id):
    async with pool.tenant(TenantId(tenant_id)) as tx:
        return await tx.fetchrow("SELECT * FROM jobs WHERE tenant_id = $1 AND job_id = $2", tenant_id, job_id)


def one_of_each(tenant_id, job_id, user, entry, signal):
    return (
        decision(
            tenant_id, job_id, 4, decision="rejected", reason="quota", current_usage=9, limit_value=9, retry_after_ms=50
        ),
        result(tenant_id, job_id, 5),
        Execution(
            tenant_id=tenant_id, job_id=job_id, attempt=2, executor="e1", status="failed", source_version=6,
            started_at_ms=T0_MS, finished_at_ms=T0_MS + 7, worker_us=7_000, error="boom",
        ),
        usage(tenant_id, 2**63 - 1, 7),
        QuotaUsage(
            tenant_id=tenant_id, quota_type="storage", used=5, reserved=1, limit_value=10, window_end_ms=T0_MS,
            source_version=8,
        ),
        Signal(
            tenant_id=tenant_id, signal_id=signal, kind="noisy", resource="worker_seconds", detail={"factor": 3},
            signalled_at_ms=T0_MS, source_version=9,
        ),
        Flag(
            tenant_id=tenant_id, flag="beta", scope="user", user_id=user, enabled=True, definition={"percent": 10},
            changed_by="me", changed_at_ms=T0_MS, source_version=10,
        ),
        AuditEntry(
            tenant_id=tenant_id, id=entry, actor="me", action="flag.set", subject="beta", recorded_at_ms=T0_MS,
            before={"a": 1}, after={"a": 2}, request_id="r1",
        ),
    )  # fmt: skip


async def test_every_kind_reaches_its_table(pool, log):
    tenant_id, job_id = TenantId(new_id()), new_id()
    user, entry, signal = new_id(), new_id(), new_id()
    await log.write(*one_of_each(tenant_id, job_id, user, entry, signal))
    expected = {
        "jobs": {
            "kind": "reconcile", "priority": "normal", "decision": "rejected", "reason": "quota", "current_usage": 9,
            "limit_value": 9, "retry_after_ms": 50, "decision_version": 4, "outcome": "succeeded",
            "accepted_attempt": 2, "result_version": 5,
        },
        "executions": {
            "attempt": 2, "executor": "e1", "status": "failed", "worker_us": 7_000, "error": "boom",
            "source_version": 6,
        },
        "tenant_usage": {"resource": "jobs", "window_seconds": 60, "quantity": 2**63 - 1, "source_version": 7},
        "tenant_quota_usage": {
            "quota_type": "storage", "used": 5, "reserved": 1, "limit_value": 10, "source_version": 8,
        },
        "tenant_signals": {"kind": "noisy", "resource": "worker_seconds", "source_version": 9},
        "feature_flags": {
            "flag": "beta", "scope": "user", "enabled": True, "killed": False, "removed": False, "changed_by": "me",
            "source_version": 10,
        },
        "audit_logs": {"actor": "me", "action": "flag.set", "subject": "beta", "request_id": "r1"},
    }  # fmt: skip
    async with pool.tenant(tenant_id) as tx:
        for table, values in expected.items():
            rows = await tx.fetch(f"SELECT * FROM {table} WHERE tenant_id = $1", tenant_id)
            assert [{name: row[name] for name in values} for row in rows] == [values], table
        stored = await tx.fetchrow("SELECT * FROM jobs")
        times = [round(stored[name].timestamp() * 1000) for name in ("requested_at", "decided_at", "finished_at")]
        assert times == [T0_MS, T0_MS + 1, T0_MS + 2]
        audit = await tx.fetchrow("SELECT before, after FROM audit_logs")
        assert [json.loads(value) for value in audit] == [{"a": 1}, {"a": 2}]
        assert json.loads(await tx.fetchval("SELECT definition FROM feature_flags WHERE flag = 'beta'")) == {
            "percent": 10
        }
    assert await log.stored() == 8


async def test_a_batch_of_many_tenants_stays_with_each_of_them(pool, log):
    tenants = [new_id() for _ in range(20)]
    await log.write(*(usage(tenant_id, i, i) for i, tenant_id in enumerate(tenants)))
    for i, tenant_id in enumerate(tenants):
        async with pool.tenant(TenantId(tenant_id)) as tx:
            assert [row[0] for row in await tx.fetch("SELECT quantity FROM tenant_usage")] == [i]


async def test_the_platforms_context_returns_after_the_call(pool):
    async with pool.platform() as tx:
        await tx.execute("SELECT project_batch('{}')")
        await tx.execute(f"""SELECT project_batch('{{"{new_id()}": {{}}}}')""")
        assert await tx.fetchval("SELECT current_setting('app.tenant_id')") == PLATFORM


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
async def test_decision_and_result_in_any_order_give_the_same_job(pool, log, order):
    tenant_id, job_id = new_id(), new_id()
    effects = [
        decision(tenant_id, job_id, 10),
        result(tenant_id, job_id, 3),
        decision(tenant_id, job_id, 9, kind="older", decision="rejected"),
        result(tenant_id, job_id, 2, outcome="failed", accepted_attempt=1),
    ]
    seen_finished = False
    for index in order:
        await log.write(effects[index])
        status = (await job(pool, tenant_id, job_id))["status"]
        assert not (seen_finished and status in {"admitted", "rejected"})
        seen_finished = seen_finished or status in {"succeeded", "failed"}
    row = await job(pool, tenant_id, job_id)
    assert (row["kind"], row["decision"], row["outcome"], row["accepted_attempt"]) == (
        "reconcile", "admitted", "succeeded", 2,
    )  # fmt: skip
    assert row["status"] == "succeeded"


async def test_recorders_that_meet_in_the_same_rows_do_not_deadlock(pool):
    jobs = [(new_id(), new_id()) for _ in range(300)]
    decisions, results = await Log(pool).open(), await Log(pool).open()

    async def write(log, effect, pairs):
        for version in range(5):
            await log.write(*(effect(tenant_id, job_id, version) for tenant_id, job_id in pairs))

    await asyncio.gather(write(decisions, decision, jobs), write(results, result, jobs[::-1]))
    for tenant_id, job_id in jobs:
        row = await job(pool, tenant_id, job_id)
        assert (row["decision_version"], row["result_version"], row["status"]) == (4, 4, "succeeded")


async def test_the_newest_of_a_batch_wins_whatever_its_place(pool, log):
    tenant_id = new_id()
    versions = [version * 7 % 50 for version in range(50)]
    await log.write(*(usage(tenant_id, version * 10, version) for version in versions))
    await log.write(usage(tenant_id, -1, 48), usage(tenant_id, -2, 49))
    async with pool.tenant(TenantId(tenant_id)) as tx:
        assert await tx.fetchval("SELECT quantity FROM tenant_usage") == 490


async def test_an_audit_entry_is_written_once(pool, log):
    tenant_id, entry = TenantId(new_id()), new_id()
    for actor in ("first", "second"):
        await log.write(
            AuditEntry(tenant_id=tenant_id, id=entry, actor=actor, action="a", subject="s", recorded_at_ms=T0_MS)
        )
    async with pool.tenant(tenant_id) as tx:
        assert [row[0] for row in await tx.fetch("SELECT actor FROM audit_logs")] == ["first"]


async def test_a_global_flag_is_the_platforms(pool, log):
    name = f"flag-{new_id()}"
    await log.write(
        Flag(
            tenant_id=PLATFORM, flag=name, scope="global", enabled=False, killed=True, definition={}, changed_by="ops",
            changed_at_ms=T0_MS, source_version=1,
        )
    )  # fmt: skip
    async with pool.tenant(TenantId(new_id())) as tx:
        assert await tx.fetchval("SELECT killed FROM feature_flags WHERE flag = $1", name) is True


async def test_a_batch_from_an_old_position_changes_nothing(pool, log):
    tenant_id = new_id()
    await log.write(usage(tenant_id, 1, 1))
    stale = PositionMove(log.consumer, log.topic_id, "t", 3, 0, 5)
    with pytest.raises(FencedError):
        await write_batch(pool, stale, [(usage(tenant_id, 2, 2),)])
    with pytest.raises(FencedError):
        await bisect(pool, stale, [(usage(tenant_id, 2, 2),)], unexpected)
    async with pool.tenant(TenantId(tenant_id)) as tx:
        assert await tx.fetchval("SELECT quantity FROM tenant_usage") == 1
    assert await log.stored() == 1


async def test_of_two_owners_with_the_same_batch_one_is_fenced(pool, log):
    move = log.move(1)
    effect = (usage(new_id(), 1, 1),)
    outcomes = await asyncio.gather(*(write_batch(pool, move, [effect]) for _ in range(4)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["FencedError"] * 3 + ["NoneType"]


async def test_a_position_of_a_re_created_topic_halts(pool, log):
    with pytest.raises(StateError, match="re-created"):
        await init_position(pool, log.consumer, new_id(), "t", 3)
    with pytest.raises(FencedError):
        await write_batch(pool, PositionMove(log.consumer, new_id(), "t", 3, 0, 1), [])
    assert await read_positions(pool, log.consumer) == [Position(log.topic_id, "t", 3, 0)]


async def test_a_first_position_is_kept(pool, log):
    log.next_offset = 0
    await log.write(usage(new_id(), 1, 1))
    assert await init_position(pool, log.consumer, log.topic_id, "t", 3, 99) == 1
    assert await init_position(pool, log.consumer, log.topic_id, "t", 4, 99) == 99


def test_a_move_that_does_not_go_forward_is_refused():
    for new in (4, 5):
        with pytest.raises(StateError, match="forward"):
            PositionMove("c", new_id(), "t", 0, 5, new)


async def unexpected(refused):
    raise AssertionError(refused)


POISON = {
    "null character": lambda t: usage(t, 1, 1, resource="a\0b"),
    "null character in a document": lambda t: Signal(
        tenant_id=t, signal_id=new_id(), kind="noisy", resource="r", detail={"k": ["\0"]}, signalled_at_ms=0,
        source_version=0,
    ),
    "lone surrogate": lambda t: usage(t, 1, 1, resource="\ud800"),
    "beyond 63 bits": lambda t: usage(t, 2**63, 1),
    "beyond 64 bits": lambda t: usage(t, 2**64, 1),
    "far future": lambda t: usage(t, 1, 1, window_start_ms=2**62),
    "unknown status": lambda t: decision(t, new_id(), decision="perhaps"),
    "job id that is no uuid": lambda t: decision(t, "job-1"),
    "tenant that is no uuid": lambda t: usage("tenant-1", 1, 1),
    "nothing for a column": lambda t: usage(t, None, 1),
    "a key too long for the index": lambda t: usage(t, 1, 1, resource=secrets.token_hex(20_000)),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISON)
async def test_a_poison_record_is_found_and_the_others_are_written(pool, log, poison):
    good = [new_id() for _ in range(20)]
    records = [(usage(tenant_id, 1, 1),) for tenant_id in good]
    for index in (7, 15):
        records.insert(index, (POISON[poison](TenantId(new_id())),))
    move = log.move(len(records))
    with pytest.raises(RecordError):
        await write_batch(pool, move, records)
    assert await log.stored() == 0

    dead: list[int] = []

    async def dead_letter(refused):
        assert await log.stored() == 0, "before the position moves"
        dead.extend(record.index for record in refused)

    refused = await bisect(pool, move, records, dead_letter)
    assert [record.index for record in refused] == dead == [7, 15]
    assert all(record.error.reason for record in refused)
    assert await log.stored() == len(records)
    for tenant_id in good:
        async with pool.tenant(TenantId(tenant_id)) as tx:
            assert await tx.fetchval("SELECT count(*) FROM tenant_usage") == 1


async def test_the_effects_of_one_record_stay_together(pool, log):
    tenant_id, job_id = new_id(), new_id()
    records = [(decision(tenant_id, job_id), usage(tenant_id, 1, 1, resource="a\0b")), ()]
    refused: list[int] = []

    async def dead_letter(found):
        refused.extend(record.index for record in found)

    await bisect(pool, log.move(2), records, dead_letter)
    assert refused == [0]
    assert await job(pool, tenant_id, job_id) is None


async def test_without_poison_no_dead_letter_is_written(pool, log):
    assert await bisect(pool, log.move(2), [(usage(new_id(), 1, 1),), ()], unexpected) == []
    assert await log.stored() == 2


async def test_a_dead_letter_that_fails_leaves_everything_as_it_was(pool, log):
    tenant_id = new_id()

    async def failing(refused):
        raise UnavailableError("Kafka")

    with pytest.raises(UnavailableError, match="Kafka"):
        await bisect(pool, log.move(2), [(usage(tenant_id, 1, 1),), (usage(new_id(), None, 1),)], failing)
    assert await log.stored() == 0
    async with pool.tenant(TenantId(tenant_id)) as tx:
        assert await tx.fetchval("SELECT count(*) FROM tenant_usage") == 0


async def test_a_backend_killed_inside_the_transaction_changes_nothing(pool, log, owner):
    tenant_id = new_id()

    async def kill(refused):
        await owner.execute(
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity"
            " WHERE usename = 'settler_app' AND state = 'idle in transaction'"
        )

    with pytest.raises(UnavailableError):
        await bisect(pool, log.move(2), [(usage(tenant_id, 1, 1),), (usage(new_id(), None, 1),)], kill)
    assert await log.stored() == 0
