"""A tenant's whole erasure on real parts: nothing is left, nobody else is touched, a kill at any point is harmless."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import asyncpg
import pytest
import pytest_asyncio

from settler_streams.adapters.kafka import dead_letter_form, dead_letters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import Selection
from settler_streams.adapters.kafka.tenant_state import TenantState
from settler_streams.adapters.postgres import erasures
from settler_streams.adapters.valkey.rate_limit import Limit, ValkeyRateLimiter
from settler_streams.adapters.valkey.tenant_keys import TenantKeys
from settler_streams.core import noise
from settler_streams.core.neighbours import Windows
from settler_streams.errors import ConflictError, NotFoundError, RecordError, UnavailableError
from settler_streams.events import (
    FileRecords,
    FlagState,
    JobRequested,
    MatchRules,
    RejectReason,
    Resource,
    UsageRecorded,
)
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import (
    AuthenticationError,
    Erasure,
    ErasureIncompleteError,
    ErasureService,
    FeatureFlagService,
    Scope,
    Tenant,
    TenantConfigurations,
    erasure_answers,
    tenant_store,
)
from settler_streams.services.backups import restore_tenant
from settler_streams.services.erasure import Progress
from settler_streams.services.exports import export_tenant
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology
from tests.adapters.postgres.conftest import owner_of
from tests.adapters.postgres.test_postgres_erasure import rows_of
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform, running_role, settled
from tests.services_layer.test_tenant_life import decision_on_a_job

pytestmark = pytest.mark.services

NO_TIME = dt.timedelta(0)
TABLES = [*(ROWS.keys() - {"tenant_children", "webhook_deliveries"}), "webhook_deliveries"]
RECORDS = FileRecords(path="a.csv", format="csv")
REQUEST = JobRequested(left=RECORDS, right=RECORDS, rules=MatchRules())
BEN = uuid7(7)
RECORD_ALONE = ["erasures.tenant_id"]


@pytest.fixture
def settings(platform: Platform, tmp_path: Path) -> Settings:
    return platform.settings.model_copy(update={"data_dir": tmp_path})


@pytest_asyncio.fixture(scope="module", autouse=True)
async def folds(platform: Platform) -> AsyncIterator[None]:
    """Beside admission, every other fold: those that have to answer, and those that forget by themselves.

    Every erasure waits for the windows of those; here they are a quarter as long.
    """
    grid = Windows(noise.GRID.width_ms // 4, noise.GRID.kept, noise.GRID.lateness_ms // 4)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(mock.patch.object(noise, "GRID", grid))
        for role in ("scheduler", "flags", "noisy-neighbour", "noisy-detector"):
            await stack.enter_async_context(running_role(role, platform.settings))
        yield


@pytest_asyncio.fixture
async def service(settings: Settings) -> AsyncIterator[ErasureService]:
    async with ErasureService.connect(settings) as service:
        yield service


@pytest_asyncio.fixture
async def owner(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    async with owner_of(settings) as connection:
        yield connection


@dataclass
class Lived:
    """A tenant that has something everywhere."""

    tenant: Tenant
    api_key: str

    @property
    def id(self) -> TenantId:
        return self.tenant.id


async def lived_in(platform: Platform, settings: Settings, **more: object) -> Lived:
    """A tenant with rows in every table, a waiting job, a flag, usage, a dead letter, files, and keys in Valkey."""
    tenant = (await platform.new_tenant(**more)).tenant  # type: ignore[arg-type]
    async with platform.pool.tenant(tenant.id) as tx:
        for table in TABLES:
            await tx.execute(ROWS[table].replace("'owner'", "'viewer'"), tenant.id, uuid.uuid4())
    key = (await platform.tenants.issue_api_key(tenant.id, [Scope.JOBS_READ])).key
    folder = settings.record_sets_dir / tenant.id / "2026"
    write(folder / "left.csv", folder / "right.csv")
    used = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=7)
    await platform.publisher.publish("usage-events", tenant.id, tenant.root_id, used)
    await platform.publisher.publish(
        "usage-events", tenant.id, TenantId(uuid7(5)), used
    )  # foreign-tenant: a dead letter
    assert (await decision_on_a_job(platform, tenant)).admitted
    await set_flag(platform, tenant)
    async with TenantConfigurations.connect(settings, platform.pool) as configurations:
        await configurations.read(tenant.id)
    limiter = ValkeyRateLimiter(settings, "http")
    await limiter.take(tenant.root_id, [Limit(tenant.id, 1, 10)], cost=10)  # full again in ten minutes, not before
    await limiter.close()
    return Lived(tenant, key)


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


async def set_flag(platform: Platform, tenant: Tenant) -> None:
    """Of a user of the tenant; returns when the flags' state says so."""
    seen = set[str]()
    feed = TopicFeed(
        platform.settings, "flag-state", lambda e: seen.add(e.tenantid) if isinstance(e.data, FlagState) else None,
        start="end",
    )  # fmt: skip
    flags = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await feed.start()
    try:
        await flags.set_flag("dark-mode", tenant.id, user_id=BEN, actor="ann")
        await settled(feed, lambda: tenant.id in seen)
    finally:
        await feed.stop()


async def state_of(settings: Settings, tenant: Tenant) -> dict[str, list[str]]:
    async with TenantState(settings, load_topology(), tenant.id, tenant.root_id).opened() as state:
        return await state.mentions()


async def keys_of(settings: Settings, tenant: Tenant) -> list[bytes]:
    keys = TenantKeys(settings)
    try:
        return sorted(await keys.find(tenant.id))
    finally:
        await keys.close()


def files_of(settings: Settings, tenant: Tenant) -> list[str]:
    folder = settings.record_sets_dir / tenant.id
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


async def deleted(platform: Platform, lived: Lived) -> Lived:
    await platform.tenants.delete(lived.id, grace=NO_TIME)
    return lived


async def test_nothing_is_left_of_an_erased_tenant_and_another_is_as_it_was(
    platform: Platform, settings: Settings, service: ErasureService, owner: asyncpg.Connection, tmp_path: Path
) -> None:
    other = await lived_in(platform, settings)
    lived = await lived_in(platform, settings)
    tenant = lived.tenant
    before = await rows_of(owner, other.id), files_of(settings, other.tenant), await keys_of(settings, other.tenant)
    held = await state_of(settings, tenant)
    assert {topic.partition(".")[2] for topic in held} >= {
        "admission-changelog", "scheduler-changelog", "flags-changelog", "flag-state"
    }  # fmt: skip
    assert len(await keys_of(settings, tenant)) == 2
    await export_tenant(settings, lived.id, tmp_path / "backup", secrets=True)
    killed_restore = settings.record_sets_dir / f"{lived.id}.restoring" / "left.csv"
    write(killed_restore)
    await deleted(platform, lived)

    told = list[str]()
    erasure = await service.erase(lived.id, actor="ann", progress=told.append)
    assert [step for step in told if not step.startswith("rows/")] == [
        "begin", "folds", "letters", "records", "files", "cache", "rows", "check"
    ]  # fmt: skip
    assert erasure.ended_at is not None
    assert (erasure.asked_by, erasure.version, erasure.root_id) == ("ann", 4, lived.id)
    assert {f"table/{table}" for table in TABLES} <= erasure.counts.keys()
    assert [erasure.counts[what] for what in ("dead-letters", "files", "cache")] == [1, 3, 2]
    topics = {name: number for name, number in erasure.counts.items() if name.startswith("topic/")}
    assert topics.keys() >= {
        "topic/job-requests", "topic/usage-events", "topic/job-decisions", "topic/pool-inputs",
        "topic/tenant-changes", "topic/flag-commands", "topic/flag-changes", "topic/job-results",
    }  # fmt: skip

    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE
    assert await state_of(settings, tenant) == {}
    assert (files_of(settings, tenant), await keys_of(settings, tenant)) == ([], [])
    assert not killed_restore.exists()
    after = await rows_of(owner, other.id), files_of(settings, other.tenant), await keys_of(settings, other.tenant)
    assert after == before
    assert "admission-changelog" in {topic.partition(".")[2] for topic in await state_of(settings, other.tenant)}

    assert await service.erase(lived.id, actor="ben") == erasure, "what has ended is not begun again"
    await refused_everywhere(platform, settings, lived, tmp_path)
    assert (await platform.tenants.authenticate(other.api_key)).tenant_id == other.id


async def refused_everywhere(platform: Platform, settings: Settings, lived: Lived, tmp_path: Path) -> None:
    """Every door, what lies in Kafka until its retention ends included; the slug is free."""
    tenant = lived.tenant
    with pytest.raises(AuthenticationError):
        await platform.tenants.authenticate(lived.api_key)
    for call in (platform.tenants.get(tenant.id), platform.tenants.restore(tenant.id)):
        with pytest.raises(NotFoundError, match="was erased"):
            await call
    with pytest.raises(NotFoundError, match="was erased"):
        await export_tenant(settings, tenant.id, tmp_path / "export")
    with pytest.raises(NotFoundError, match="was erased"):
        await restore_tenant(settings, tmp_path / "backup")
    await settled(platform.directory.feed, lambda: platform.directory.is_erased(tenant.id))
    assert platform.directory.get(tenant.id) is None
    assert tenant.id not in set(platform.directory)
    with pytest.raises(NotFoundError):
        await platform.directory.find(tenant.id)
    letters = await dead_letters.select(settings, load_topology(), Selection(), 1_000)
    assert [letter.value for letter in letters if tenant.id.encode() in letter.value] == []
    late = await decision_on_a_job(platform, tenant)
    assert (late.admitted, late.reason) == (False, RejectReason.UNKNOWN_TENANT)
    assert await state_of(settings, tenant) == {}, "what came late has brought nothing back"
    again = await platform.new_tenant()
    assert again.tenant.id != tenant.id


class KilledError(Exception):
    """Stands for the end of the process."""


async def test_whoever_is_killed_at_any_point_is_continued_by_the_next_call(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures, "BATCH_ROWS_MAX", 1)
    lived, other = await lived_in(platform, settings), await lived_in(platform, settings)
    before = await rows_of(owner, other.id)
    rows = sum(len(each) for each in (await rows_of(owner, lived.id)).values()) - len(["tenants", "tenant_slugs"])
    await deleted(platform, lived)
    died = list[str]()

    def dying(done: str) -> None:
        batch = done.startswith("rows/") and done != "rows/tenants"
        if batch or done not in died:
            died.append(done)
            raise KilledError(done)

    erasure: Erasure | None = None
    while erasure is None:
        async with ErasureService.connect(settings) as service:  # another process
            with contextlib.suppress(KilledError):
                erasure = await service.erase(lived.id, actor="ann", progress=dying)
    assert set(died) >= {"begin", "folds", "letters", "records", "files", "cache", "rows", "rows/tenants", "check"}
    deletions = {"tenant.deleted": 1}  # is one audit entry more than were counted above
    counted = {name: number for name, number in erasure.counts.items() if name.startswith("table/")}
    assert sum(counted.values()) == rows + sum(deletions.values())
    assert len([each for each in died if each.startswith("rows/")]) == sum(counted.values()) + 1
    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE
    assert (await state_of(settings, lived.tenant), await keys_of(settings, lived.tenant)) == ({}, [])
    assert await rows_of(owner, other.id) == before


async def test_a_cancellation_in_the_middle_is_continued_as_well(
    platform: Platform, settings: Settings, service: ErasureService, owner: asyncpg.Connection
) -> None:
    lived = await deleted(platform, await lived_in(platform, settings))
    for point in ("begin", "rows/users"):
        reached = asyncio.Event()
        task = asyncio.create_task(
            service.erase(lived.id, progress=lambda done, at=point, on=reached: on.set() if done == at else None)
        )
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await service.unfinished(platform.directory) == [lived.id]
    assert (await service.erase(lived.id)).ended_at is not None
    assert await service.unfinished(platform.directory) == []
    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE


async def test_a_process_that_is_killed_by_the_kernel_is_continued_by_the_next(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, tmp_path: Path
) -> None:
    lived = await deleted(platform, await lived_in(platform, settings))
    environment = {**os.environ, **settings.environment(), "SETTLER_STATE_DIR": str(tmp_path / "state")}
    command = [sys.executable, "-m", "settler_streams.cli.main", "tenants", "erase", lived.id, "--yes", "--json"]
    for step in (b"begin", b"folds", b"files", b"rows/"):
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        assert process.stderr is not None
        try:
            async with asyncio.timeout(SETTLED_WITHIN_S):
                while not (line := await process.stderr.readline()).startswith(step):
                    assert line, f"it has ended before {step!r}"
        finally:
            process.kill()
            await process.wait()
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(2 * SETTLED_WITHIN_S):
        printed, _ = await process.communicate()
    assert (process.returncode, json.loads(printed)["tenant_id"]) == (0, lived.id)
    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE
    assert (files_of(settings, lived.tenant), await keys_of(settings, lived.tenant)) == ([], [])


async def test_two_processes_at_once_erase_a_tenant_once(
    platform: Platform, settings: Settings, owner: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures, "BATCH_ROWS_MAX", 1)
    lived = await deleted(platform, await lived_in(platform, settings))
    there = await rows_of(owner, lived.id)
    rows = sum(len(each) for name, each in there.items() if name != "outbox.tenant_id") - len(
        ["tenants", "tenant_slugs"]
    )
    async with ErasureService.connect(settings) as one, ErasureService.connect(settings) as two:
        records = await asyncio.gather(one.erase(lived.id, actor="ann"), two.erase(lived.id, actor="ben"))
    assert records[0] == records[1]
    counted = {name: number for name, number in records[0].counts.items() if name.startswith("table/")}
    # What each has asked of the folds stands in the outbox until it is sent; the answers to one serve both.
    assert counted.pop("table/outbox", 0) <= 2
    assert sum(counted.values()) == rows
    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE


async def test_what_may_not_be_erased_is_refused_and_parents_come_after_their_children(
    platform: Platform, settings: Settings, service: ErasureService, owner: asyncpg.Connection
) -> None:
    parent = (await platform.new_tenant()).tenant
    child = (await platform.new_tenant(parent_id=parent.id)).tenant
    with pytest.raises(ConflictError, match="is active; only what was deleted"):
        await service.erase(child.id)
    await platform.tenants.delete(child.id, grace=dt.timedelta(days=1))
    with pytest.raises(ConflictError, match="can be restored until"):
        await service.erase(child.id)
    await platform.tenants.restore(child.id)
    await platform.tenants.delete(child.id, grace=NO_TIME)
    last = await platform.tenants.delete(parent.id, grace=NO_TIME)
    with pytest.raises(ConflictError, match=f"has a child, {child.id}; erase that first"):
        await service.erase(parent.id)
    with pytest.raises(NotFoundError, match="no tenant"):
        await service.erase(TenantId(uuid7(1)))
    assert await service.get(parent.id) is None, "what is refused leaves no record"

    def knows_both() -> bool:
        found = platform.directory.get(parent.id)
        return found is not None and found.version == last.version

    await settled(platform.directory.feed, knows_both)
    due = [tenant.id for tenant in await platform.tenants.erasable(platform.directory)]
    assert [each for each in due if each in (parent.id, child.id)] == [child.id, parent.id]
    for tenant_id in (child.id, parent.id):
        assert (await service.erase(tenant_id)).ended_at is not None
        assert list(await rows_of(owner, tenant_id)) == RECORD_ALONE
    assert not {parent.id, child.id} & {tenant.id for tenant in await platform.tenants.erasable(platform.directory)}


async def test_a_child_that_is_being_erased_is_passed_over_and_keeps_nobody_from_deleting_its_parent(
    platform: Platform, service: ErasureService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(done: str) -> None:
        raise KilledError(done)

    parent = (await platform.new_tenant()).tenant
    first, second, living = [(await platform.new_tenant(parent_id=parent.id)).tenant for _ in range(3)]
    for child in (first, second):
        await platform.tenants.delete(child.id, grace=NO_TIME)
        with pytest.raises(KilledError):
            await service.erase(child.id, progress=dying)
    assert await platform.tenants.children(parent.id) == [living]
    assert await platform.tenants.children(parent.id, limit=1) == [living], "they take no room of a page"
    assert await platform.tenants.children(parent.id, after=living.id) == []
    with monkeypatch.context() as patch:
        patch.setattr(tenant_store, "CHILDREN_PAGE", 1)
        with pytest.raises(ConflictError, match=f"has a child, {living.id} "):
            await platform.tenants.delete(parent.id, grace=NO_TIME)
        await platform.tenants.delete(living.id, grace=NO_TIME)
        await platform.tenants.delete(parent.id, grace=NO_TIME)
    for child in (first, second, living):
        with pytest.raises(ConflictError, match=f"has a child, {child.id}; erase that first"):
            await service.erase(parent.id)
        assert (await service.erase(child.id)).ended_at is not None
    assert (await service.erase(parent.id)).ended_at is not None


async def test_what_is_left_is_named_and_goes_with_the_next_call(
    platform: Platform, settings: Settings, service: ErasureService, owner: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lived = await deleted(platform, await lived_in(platform, settings))
    delete_rows = service._delete_rows

    async def meddled_with(erasure: Erasure, progress: Progress) -> None:
        await delete_rows(erasure, progress)
        write(settings.record_sets_dir / lived.id / "late.csv")
        await refuse_late(settings, lived.id)

    with monkeypatch.context() as patch:
        patch.setattr(service, "_delete_rows", meddled_with)
        with pytest.raises(
            ErasureIncompleteError, match="letters: 1 dead letters; files: its folder is there"
        ) as refused:
            await service.erase(lived.id)
    assert list(refused.value.left) == ["letters", "files"]
    record = await service.get(lived.id)
    assert record is not None
    assert (record.ended_at, set(record.steps)) == (None, {"folds", "records", "cache", "rows"})
    record = await service.erase(lived.id)
    assert record.ended_at is not None
    assert (record.counts["files"], record.counts["dead-letters"]) == (2, 2), "files as the first look has found them"
    assert list(await rows_of(owner, lived.id)) == RECORD_ALONE


async def refuse_late(settings: Settings, tenant: TenantId) -> None:
    """As a worker that has not heard of the erasure."""
    raw: Any = SimpleNamespace(
        key=tenant.encode(), value=b"late", headers=(), partition=0, offset=10**6, topic=full_name("d", "job-requests")
    )
    letter = dead_letter_form.letter(raw, "admission", RecordError("schema", "late"), 1_000)
    topic = full_name(settings.deployment, "dead-letters")
    async with Cluster.of(settings).producer(acks="all") as producer:
        await producer.send_and_wait(topic, letter.value, key=letter.key, partition=0, headers=letter.headers)


async def test_a_fold_that_does_not_answer_is_named_and_asked_again(
    platform: Platform, settings: Settings, service: ErasureService, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = (await platform.new_tenant()).tenant
    await platform.tenants.delete(tenant.id, grace=NO_TIME)
    with monkeypatch.context() as patch:
        patch.setattr(erasure_answers, "FORGOTTEN_WITHIN_S", 3.0)
        patch.setattr(service, "_folds", lambda _root: {("nobody", 7)})
        with pytest.raises(UnavailableError, match="nobody 7; see that workers run"):
            await service.erase(tenant.id)
    assert (await service.erase(tenant.id)).ended_at is not None


async def test_flags_of_an_erased_tenant_are_forgotten_by_whoever_follows_them(
    platform: Platform, settings: Settings, service: ErasureService
) -> None:
    tenant = (await platform.new_tenant()).tenant
    flags = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await flags.start()
    try:
        await set_flag(platform, tenant)
        await settled(flags.feed, lambda: flags.evaluate("dark-mode", tenant.id, BEN).version == 1)
        await platform.tenants.delete(tenant.id, grace=NO_TIME)
        await service.erase(tenant.id)
        await settled(platform.directory.feed, lambda: platform.directory.is_erased(tenant.id))
        assert flags.evaluate("dark-mode", tenant.id, BEN).version == 0
    finally:
        await flags.stop()
    later = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await later.start()
    assert later.evaluate("dark-mode", tenant.id, BEN).version == 0, "nor does one that starts later learn of them"
    await later.stop()
