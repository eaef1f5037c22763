"""Quotas, flags, noisy neighbours and the queue, as the specification's examples use them."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from settler_streams.adapters.postgres import projection
from settler_streams.adapters.postgres.effects import QuotaUsage, Signal
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.client import Caller, KafkaTransport
from settler_streams.core.flags import FlagReason
from settler_streams.errors import InvalidRequestError, NotFoundError
from settler_streams.events import (
    FileRecords,
    FlagCommand,
    FlagScope,
    FlagState,
    JobRequested,
    MatchRules,
    QueuePriority,
    QuotaType,
    TenantTier,
)
from settler_streams.ids import PLATFORM, JobId, TenantId, uuid7
from settler_streams.services import (
    FeatureFlagService,
    NoisyNeighborDetection,
    PrioritizedQueue,
    QueueItem,
    QuotaExceededError,
    QuotaService,
    feed,
    move_tenant,
)
from settler_streams.services.feed import TopicFeed
from tests.adapters.postgres.conftest import owner_of
from tests.services.interface import Service
from tests.services_layer.platform import Platform, settled

pytestmark = pytest.mark.services


async def _project(platform: Platform, *effects: QuotaUsage | Signal) -> None:
    topic_id = str(uuid.uuid4())
    await projection.init_position(platform.pool, "test", topic_id, topic_id, 0)
    move = projection.PositionMove("test", topic_id, topic_id, 0, 0, 1)
    await projection.write_batch(platform.pool, move, [effects])


def _storage(tenant_id: TenantId, used: int, **more: int) -> QuotaUsage:
    return QuotaUsage(tenant_id=tenant_id, quota_type="storage", used=used, reserved=0, source_version=1, **more)


def _signal(tenant_id: TenantId, kind: str, at_ms: int) -> Signal:
    detail = {"used": 400, "others_average": 100, "ratio_per_mille": 4000}
    return Signal(
        tenant_id=tenant_id, signal_id=str(uuid.uuid4()), kind=kind, resource="requests", detail=detail,
        signalled_at_ms=at_ms, source_version=at_ms,
    )  # fmt: skip


async def test_check_quota(platform: Platform) -> None:
    service = QuotaService(platform.pool)
    tenant = (await platform.new_tenant(quotas={QuotaType.STORAGE: 10 * 1024 * 1024})).tenant
    assert await service.check_quota(tenant.id, QuotaType.STORAGE, 1024 * 1024) == (True, 0, 10 * 1024 * 1024)
    await _project(platform, _storage(tenant.id, 10 * 1024 * 1024 - 1))
    allowed, current_usage, limit = await service.check_quota(tenant.id, QuotaType.STORAGE, 1)
    assert (allowed, current_usage, limit) == (True, 10 * 1024 * 1024 - 1, 10 * 1024 * 1024)
    check = await service.check_quota(tenant.id, QuotaType.STORAGE, 2)
    assert not check.allowed
    with pytest.raises(QuotaExceededError) as caught:
        await service.require(tenant.id, QuotaType.STORAGE, 2)
    assert (caught.value.quota_type, caught.value.current_usage) == (QuotaType.STORAGE, check.current_usage)
    await platform.tenants.change_tier(tenant.id, TenantTier.ENTERPRISE)
    assert (await service.check_quota(tenant.id, QuotaType.STORAGE, 2)).allowed
    with pytest.raises(InvalidRequestError):
        await service.check_quota(tenant.id, QuotaType.STORAGE, -1)
    with pytest.raises(NotFoundError):
        await service.check_quota(TenantId(uuid7(1)), QuotaType.STORAGE, 1)


async def test_a_parents_quota_binds_its_children(platform: Platform) -> None:
    parent = (await platform.new_tenant(quotas={QuotaType.STORAGE: 100})).tenant
    child = (await platform.new_tenant(parent_id=parent.id)).tenant
    await _project(platform, _storage(parent.id, 95))
    assert await QuotaService(platform.pool).check_quota(child.id, QuotaType.STORAGE, 6) == (False, 95, 100)


async def test_an_ended_window_counts_nothing(platform: Platform) -> None:
    tenant = (await platform.new_tenant(quotas={QuotaType.STORAGE: 100})).tenant
    await _project(platform, _storage(tenant.id, 100, window_end_ms=1))
    assert (await QuotaService(platform.pool).check_quota(tenant.id, QuotaType.STORAGE, 100)).allowed


@pytest_asyncio.fixture(scope="module")
async def flags(platform: Platform) -> AsyncIterator[FeatureFlagService]:
    service = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await service.start()
    yield service
    await service.stop()


async def _state(platform: Platform, tenant: TenantId, root: TenantId, version: int = 1, **more: object) -> None:
    fields = {"flag": "new-feature", "scope": FlagScope.TENANT, "version": version, "changed_at_ms": 1} | more
    await platform.publisher.publish("flag-state", tenant, root, FlagState(**fields))  # type: ignore[arg-type]


async def test_a_flag_follows_user_tenant_parent_and_kill(platform: Platform, flags: FeatureFlagService) -> None:
    root = (await platform.new_tenant()).tenant
    child = (await platform.new_tenant(parent_id=root.id)).tenant
    await platform.directory.find(child.id)
    user_id = str(uuid.uuid4())

    async def reaches(version: int) -> None:
        await settled(flags.feed, lambda: flags.evaluate("new-feature", child.id, user_id).version == version)

    assert not await flags.is_enabled("new-feature", child.id, user_id)
    assert await flags.is_enabled("new-feature", child.id, user_id, default=True)
    await _state(platform, root.id, root.id, 11)
    await reaches(11)
    assert await flags.is_enabled("new-feature", child.id, user_id), "from the parent"
    await _state(platform, child.id, root.id, 12, enabled=False)
    await reaches(12)
    assert not await flags.is_enabled("new-feature", child.id, user_id), "the tenant's own is nearer"
    await _state(platform, child.id, root.id, 13, scope=FlagScope.USER, user_id=user_id)
    await reaches(13)
    assert await flags.is_enabled("new-feature", child.id, user_id), "the user's is nearest"
    assert not await flags.is_enabled("new-feature", child.id)
    await _state(platform, PLATFORM, root.id, 14, scope=FlagScope.GLOBAL, killed=True)
    await reaches(14)
    answer = flags.evaluate("new-feature", child.id, user_id)
    assert (answer.enabled, answer.reason) == (False, FlagReason.KILLED)


async def test_a_later_process_loads_what_was_set_before(platform: Platform) -> None:
    tenant = (await platform.new_tenant()).tenant
    await _state(platform, tenant.id, tenant.id, 21, flag="loaded")
    service = FeatureFlagService(platform.settings, platform.directory, platform.publisher)
    await service.start()
    try:
        assert await service.is_enabled("loaded", tenant.id), "start() returns with everything loaded"
    finally:
        await service.stop()


async def test_flag_commands_are_published_for_the_agent(platform: Platform, flags: FeatureFlagService) -> None:
    tenant = (await platform.new_tenant()).tenant
    seen: list[tuple[str, FlagCommand]] = []
    commands = TopicFeed(
        platform.settings,
        "flag-commands",
        lambda e: seen.append((e.tenantid, e.data)),  # type: ignore[arg-type]
        start="end",
    )
    await commands.start()
    try:
        await flags.set_flag("f", tenant.id, actor="me", rollout_per_mille=250, user_id=(user := str(uuid.uuid4())))
        await flags.kill("f", actor="me", reason="bad")
        await flags.revive("f", tenant.id, actor="me", reason="good")
        await settled(commands, lambda: len(seen) == 3)
    finally:
        await commands.stop()
    told = {(t, c.scope, c.action, c.user_id) for t, c in seen}
    assert told == {
        (tenant.id, "user", "set", user),
        (PLATFORM, "global", "kill", None),
        (tenant.id, "tenant", "revive", None),
    }
    with pytest.raises(NotFoundError):
        await flags.set_flag("f", actor="me", user_id=user)


async def test_current_verdicts_name_nobody_else(platform: Platform) -> None:
    loud, quiet, calmed = [(await platform.new_tenant()).tenant.id for _ in range(3)]

    await _project(
        platform, _signal(loud, "noisy", 1), _signal(calmed, "noisy", 1), _signal(calmed, "quiet", 2),
        _signal(loud, "quiet", 2), _signal(loud, "noisy", 3),
    )  # fmt: skip
    detection = NoisyNeighborDetection(platform.pool, platform.directory)
    (verdict,) = await detection.verdicts_of(loud)
    assert (verdict.resource, verdict.ratio_per_mille) == ("requests", 4000)
    assert verdict.since == dt.datetime.fromtimestamp(0.003, dt.UTC)
    assert quiet not in str(verdict)
    assert await detection.verdicts_of(calmed) == []
    for tenant_id in (loud, quiet, calmed):  # each is heard of in a partition of its own
        await platform.directory.find(tenant_id)
    assert [v.tenant_id for v in await detection.verdicts()] == [loud]
    assert await detection.verdicts([quiet, calmed]) == []


async def test_verdicts_pass_over_tenants_that_are_being_erased(platform: Platform) -> None:
    """Wherever they stand, also behind one with a schema of its own; and on a replica, which asks for the place."""
    first, loud, last = [(await platform.new_tenant()).tenant.id for _ in range(3)]
    await move_tenant(platform.settings, loud, own_schema=True)
    await _project(platform, _signal(loud, "noisy", 1), _signal(last, "noisy", 1))
    async with owner_of(platform.settings) as owner:
        for erased in (first, last):
            row = "INSERT INTO erasures (tenant_id, root_id, version, asked_by) VALUES ($1, $1, 1, 'x')"
            await owner.execute(row, erased)
    reading = platform.settings.model_copy(update={"db_read_host": platform.settings.db_host})
    replicated = await TenantConnectionPool.open(reading)
    try:
        for pool in (platform.pool, replicated):
            detection = NoisyNeighborDetection(pool, platform.directory)
            assert [v.tenant_id for v in await detection.verdicts([first, loud, last])] == [loud]
            assert await detection.verdicts([last]) == []
    finally:
        await replicated.close()


async def test_a_tier_that_the_caller_passes_is_ignored(platform: Platform) -> None:
    queue = PrioritizedQueue(platform.publisher, platform.directory)
    tenant = (await platform.new_tenant(TenantTier.FREE, quotas={QuotaType.CONCURRENT_JOBS: 0})).tenant
    transport = KafkaTransport(platform.settings)
    await transport.start()
    try:
        job_id = JobId(uuid7(int(dt.datetime.now(dt.UTC).timestamp() * 1000)))
        records = FileRecords(path="a.csv", format="csv")
        request = JobRequested(left=records, right=records, rules=MatchRules())
        item = QueueItem(tenant_id=tenant.id, tenant_tier=TenantTier.ENTERPRISE, job_id=job_id, request=request)
        assert await queue.add(item, QueuePriority.HIGH) == job_id
        decision = await transport.decision(Caller(tenant.id, tenant.id), job_id, 60)
    finally:
        await transport.stop()
    assert decision.priority is QueuePriority.HIGH
    assert not decision.admitted, "an Enterprise tenant would have passed the quota"
    assert decision.quota is QuotaType.CONCURRENT_JOBS


async def test_a_tenant_that_is_not_known_cannot_queue(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("settler_streams.services.directory.KNOWN_WITHIN_S", 0.1)
    records = FileRecords(path="a.csv", format="csv")
    request = JobRequested(left=records, right=records, rules=MatchRules())
    with pytest.raises(NotFoundError):
        await PrioritizedQueue(platform.publisher, platform.directory).add(
            QueueItem(tenant_id=TenantId(uuid7(1)), request=request)
        )


async def test_z_without_kafka_flags_still_answer_and_say_that_they_are_stale(
    platform: Platform, flags: FeatureFlagService, kafka: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STALE_AFTER_S", "PROBE_INTERVAL_S", "PROBE_DEADLINE_S"):
        monkeypatch.setattr(feed, name, {"STALE_AFTER_S": 1.5, "PROBE_INTERVAL_S": 0.3, "PROBE_DEADLINE_S": 0.5}[name])
    tenant = (await platform.new_tenant()).tenant
    await platform.directory.find(tenant.id)
    await _state(platform, tenant.id, tenant.id, 31, flag="kept")
    await settled(flags.feed, lambda: flags.evaluate("kept", tenant.id).version == 31)

    async def becomes(reason: str) -> None:
        async with asyncio.timeout(60):
            while flags.evaluate("kept", tenant.id).reason != reason:
                await asyncio.wait([flags.feed._task], timeout=0.1)  # type: ignore[list-item]

    kafka.pause()
    try:
        await becomes("STALE")
        assert await flags.is_enabled("kept", tenant.id)
    finally:
        kafka.resume()
    await becomes(FlagReason.STATIC)
