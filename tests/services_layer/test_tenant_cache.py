"""The tenant cache on a real Valkey and PostgreSQL: what is shared, refused, forgotten, and what happens without it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
import pytest_asyncio
import redis.asyncio

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey import tenant_cache
from settler_streams.adapters.valkey.tenant_cache import TTL_JITTER, TTL_S, VALUE_BYTES_MAX, TenantCache
from settler_streams.errors import NotFoundError
from settler_streams.events import QuotaType
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import tenant_configurations
from settler_streams.services.tenant_configurations import encoded
from settler_streams.services.tenant_store import VALUE_FORMAT
from settler_streams.services.tenant_store import read as read_tenant
from settler_streams.settings import Settings
from tests.services.interface import Service, Services
from tests.services_layer.cached_tenants import Reader, change_row, insert_tenant, reader

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a second is enough for a gateway, and not for every machine that runs tests."""
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 60.0)


@pytest.fixture(scope="module")
def settings(services: Services, postgres: Service, valkey: Service) -> Settings:
    token = secrets.token_hex(4)
    return services.settings.model_copy(update={"deployment": f"t-{token}", "db_name": f"t_{token}"})


@pytest_asyncio.fixture
async def pool(settings: Settings) -> AsyncIterator[TenantConnectionPool]:
    await migrate(settings)
    pool = await TenantConnectionPool.open(settings)
    yield pool
    await pool.close()


@pytest_asyncio.fixture
async def process(settings: Settings, pool: TenantConnectionPool) -> AsyncIterator[Reader]:
    async with reader(settings, pool) as process:
        yield process


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url())
    yield client
    await client.aclose()


async def _told(client: redis.asyncio.Redis, process: Reader, tenant_id: TenantId, version: bytes) -> None:
    """Wait until Valkey knows of the version."""
    async with asyncio.timeout(60):
        while await client.hget(process.cache.key(tenant_id), "v") != version:
            pass


@pytest_asyncio.fixture
async def tenant(pool: TenantConnectionPool, process: Reader, client: redis.asyncio.Redis) -> TenantId:
    """One that the process, and by it Valkey, has heard of."""
    tenant_id = await insert_tenant(pool)
    process.directory.hear(tenant_id, 1)
    await _told(client, process, tenant_id, b"1")
    return tenant_id


@pytest.fixture
def counted() -> Callable[[str], int]:
    """How often an outcome was counted since the test began."""

    def now(outcome: str) -> float:
        return METRICS.registry.get_sample_value("settler_tenant_cache_total", {"outcome": outcome}) or 0.0

    known = ("hit", "miss", "outdated", "foreign", "bypassed", "stored", "stale-write", "lease-ended", "too-large",
             "error", "lost")  # fmt: skip
    before = {outcome: now(outcome) for outcome in known}
    return lambda outcome: int(now(outcome) - before[outcome])


async def test_a_second_read_asks_no_database(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, counted: Callable[[str], int]
) -> None:
    first = await process.configurations.read(tenant)
    assert (first.version, first.config, first.quotas) == (1, {"region": "eu"}, {QuotaType.STORAGE: 1})
    async with pool.tenant(tenant) as tx:
        await tx.execute("UPDATE tenants SET name = 'behind its back' WHERE id = $1", tenant)
    assert await process.configurations.read(tenant) == first
    assert (counted("miss"), counted("stored"), counted("hit")) == (1, 1, 1)


async def test_those_who_ask_at_the_same_time_share_one_look_up(
    process: Reader, tenant: TenantId, counted: Callable[[str], int]
) -> None:
    found = await asyncio.gather(*(process.configurations.read(tenant) for _ in range(200)))
    assert len({id(one) for one in found}) == 1
    assert counted("miss") == 1


async def test_one_who_gives_up_leaves_the_look_up_to_the_others(process: Reader, tenant: TenantId) -> None:
    first, second = (asyncio.create_task(process.configurations.read(tenant)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).version == 1


async def test_who_has_seen_a_change_does_not_join_an_earlier_look_up(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool
) -> None:
    earlier = asyncio.create_task(process.configurations.read(tenant))
    await asyncio.sleep(0)
    version = await change_row(pool, tenant)
    await process.configurations.invalidate(tenant, version)
    assert (await process.configurations.read(tenant)).version == version
    await earlier


async def test_an_event_reaches_valkey_and_with_it_other_processes(
    process: Reader, tenant: TenantId, settings: Settings, pool: TenantConnectionPool, client: redis.asyncio.Redis
) -> None:
    async with reader(settings, pool) as other:
        other.directory.hear(tenant, 1)
        assert (await other.configurations.read(tenant)).version == 1
        version = await change_row(pool, tenant)
        process.directory.hear(tenant, version)  # the other one has not heard of it
        await _told(client, process, tenant, b"2")
        assert (await other.configurations.read(tenant)).version == 2


@pytest.mark.parametrize("between", ["invalidated", "flushed", "flushed and read", "stored"])
async def test_a_stale_write_is_refused(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, client: redis.asyncio.Redis, between: str
) -> None:
    cache = process.cache
    found = await cache.read(tenant)
    assert found is not None
    assert found.lease is not None
    async with pool.tenant(tenant) as tx:
        old = await read_tenant(tx, tenant)
    await change_row(pool, tenant)
    if between == "invalidated":
        await cache.invalidate(tenant, 2)
    elif between.startswith("flushed"):
        await client.flushall()
        if between.endswith("read"):
            await cache.read(tenant)  # somebody else's lease
    else:
        assert (await process.configurations.read(tenant)).version == 2
    assert not await cache.store(tenant, 1, encoded(old), found.lease)
    assert (await process.configurations.read(tenant)).version == 2


async def test_even_a_lease_from_after_the_change_stores_nothing_older(
    process: Reader, tenant: TenantId, counted: Callable[[str], int]
) -> None:
    """As one who reads from a database that lags."""
    await process.cache.invalidate(tenant, 10**18)
    found = await process.cache.read(tenant)
    assert found is not None
    assert found.lease is not None
    assert not await process.cache.store(tenant, 10**18 - 1, b"old", found.lease)
    assert counted("stale-write") == 1
    assert await process.cache.store(tenant, 10**18, b"new", found.lease)


async def test_an_erased_tenant_stays_erased(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, client: redis.asyncio.Redis
) -> None:
    found = await process.cache.read(tenant)
    assert found is not None
    assert found.lease is not None
    async with pool.tenant(tenant) as tx:
        old = await read_tenant(tx, tenant)
    await process.configurations.invalidate(tenant, 2)
    assert not await process.cache.store(tenant, 1, encoded(old), found.lease)
    assert await client.hgetall(process.cache.key(tenant)) == {b"v": b"2"}
    assert 0 < await client.pttl(process.cache.key(tenant)) <= tenant_cache.TTL_MAX_S * 1000


async def test_of_a_tenant_that_is_not_nothing_is_kept(process: Reader, client: redis.asyncio.Redis) -> None:
    stranger = TenantId(uuid7(1))
    with pytest.raises(NotFoundError):
        await process.configurations.read(stranger)
    assert await client.exists(process.cache.key(stranger)) == 0
    with pytest.raises(ValueError, match="canonical"):
        process.cache.key(TenantId("*"))


@pytest.mark.parametrize("what", ["text", "nonsense", "other tenant", "other version", "no version", "more fields"])
async def test_what_nobody_stored_is_dropped(
    process: Reader,
    tenant: TenantId,
    pool: TenantConnectionPool,
    client: redis.asyncio.Redis,
    counted: Callable[[str], int],
    what: str,
) -> None:
    key, other = process.cache.key(tenant), await insert_tenant(pool)
    async with pool.tenant(other) as tx:
        foreign = encoded(await read_tenant(tx, other))
    async with pool.tenant(tenant) as tx:
        own = encoded(await read_tenant(tx, tenant))
    fields = {
        "nonsense": {"v": "1", "d1": b"\xff\x00"},
        "other tenant": {"v": "1", "d1": foreign},
        "other version": {"v": "2", "d1": own},
        "no version": {"v": "-1", "d1": own},
        "more fields": {"v": "1", "d1": own[:-1] + b",1]"},
    }
    await (client.set(key, "x") if what == "text" else client.hset(key, mapping=fields[what]))
    assert (await process.configurations.read(tenant)).id == tenant
    assert counted("foreign") == 1
    assert counted("hit") == 0
    await process.configurations.read(tenant)
    await process.configurations.read(tenant)
    assert counted("hit") >= 1


async def test_every_key_ends_and_not_all_at_once(
    process: Reader, pool: TenantConnectionPool, client: redis.asyncio.Redis
) -> None:
    ends = set()
    for _ in range(20):
        tenant = await insert_tenant(pool)
        process.directory.hear(tenant, 1)
        await _told(client, process, tenant, b"1")
        await process.configurations.read(tenant)
        left_ms = await client.pttl(process.cache.key(tenant))
        assert TTL_S * (1 - TTL_JITTER) - 60 < left_ms / 1000 <= TTL_S * (1 + TTL_JITTER)
        ends.add(left_ms // 1000)
    assert max(ends) - min(ends) > 10
    await client.persist(process.cache.key(tenant))
    await process.configurations.read(tenant)
    assert await client.pttl(process.cache.key(tenant)) > 0, "one that would stay for ever is given an end"


async def test_a_large_configuration_is_not_kept(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, counted: Callable[[str], int]
) -> None:
    async with pool.tenant(tenant) as tx:
        large = msgspec.json.encode({"notes": "x" * VALUE_BYTES_MAX}).decode()
        await tx.execute("UPDATE tenants SET config = $2::text::jsonb WHERE id = $1", tenant, large)
    assert (await process.configurations.read(tenant)).config["notes"]
    assert counted("too-large") == 1


async def test_two_formats_live_side_by_side_and_end_together(settings: Settings, process: Reader) -> None:
    """As during an upgrade."""
    tenant, old = TenantId(uuid7(1)), process.cache
    new = TenantCache(settings, value_format=VALUE_FORMAT + 1)
    for cache, value in ((old, b"old form"), (new, b"new form")):
        found = await cache.read(tenant)
        assert found is not None
        assert found.lease is not None
        assert await cache.store(tenant, 1, value, found.lease)
    assert [found.value for c in (old, new) if (found := await c.read(tenant))] == [b"old form", b"new form"]
    await new.invalidate(tenant, 2)
    assert [found.value for c in (old, new) if (found := await c.read(tenant))] == [None, None]
    await new.close()


async def test_the_bytes_of_this_format(pool: TenantConnectionPool) -> None:
    """When this changes, VALUE_FORMAT has to be raised."""
    tenant_id = await insert_tenant(pool)
    async with pool.tenant(tenant_id) as tx:
        tenant = await read_tenant(tx, tenant_id)
    expected = (
        f'["{tenant_id}",1,"{tenant.slug}","as of 1","starter","active","{tenant_id}",null,'
        '{"storage":1},{"region":"eu"},null,null]'
    )
    assert (VALUE_FORMAT, encoded(tenant)) == (1, expected.encode())


async def test_deployments_do_not_meet(settings: Settings, process: Reader, tenant: TenantId) -> None:
    await process.configurations.read(tenant)
    elsewhere = TenantCache(settings.model_copy(update={"deployment": "elsewhere"}), value_format=VALUE_FORMAT)
    found = await elsewhere.read(tenant)
    assert found is not None
    assert found.value is None
    await elsewhere.close()


async def test_a_process_that_may_miss_changes_asks_the_database(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, counted: Callable[[str], int]
) -> None:
    await process.configurations.read(tenant)
    await change_row(pool, tenant)
    process.directory.deaf = True
    assert (await process.configurations.read(tenant)).version == 2
    assert counted("bypassed") == 1
    process.directory.deaf = False
    assert (await process.configurations.read(tenant)).version == 2, "what was seen is not forgotten"
    assert counted("outdated") == 1


async def test_more_versions_seen_than_are_remembered(
    settings: Settings,
    pool: TenantConnectionPool,
    process: Reader,
    tenant: TenantId,
    counted: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenant_configurations, "FLOORS_MAX", 2)
    await process.configurations.read(tenant)
    for _ in range(3):
        await process.configurations.invalidate(TenantId(uuid7(1)), 5)
    assert (await process.configurations.read(tenant)).version == 1
    assert counted("bypassed") == 1, "until everything has expired that could be older than what was forgotten"


async def test_without_valkey_the_database_is_asked(
    process: Reader, tenant: TenantId, pool: TenantConnectionPool, valkey: Service, counted: Callable[[str], int]
) -> None:
    await process.configurations.read(tenant)
    valkey.kill()
    try:
        for version in (2, 3, 4):
            await change_row(pool, tenant)
            assert not await process.configurations.invalidate(tenant, version)
            assert (await process.configurations.read(tenant)).version == version
        assert counted("error") == 1, "only the first one asked Valkey"
    finally:
        valkey.start()
    assert process.cache._probe is not None
    async with asyncio.timeout(60):
        await process.cache._probe
    await process.configurations.read(tenant)
    assert (await process.configurations.read(tenant)).version == 4
    assert counted("hit") == 1


async def test_a_valkey_that_hangs_costs_one_deadline(
    process: Reader,
    tenant: TenantId,
    pool: TenantConnectionPool,
    valkey: Service,
    counted: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await process.configurations.read(tenant)
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 0.25)
    valkey.pause()
    try:
        began_s = time.monotonic()
        for _ in range(100):
            assert (await process.configurations.read(tenant)).version == 1
        assert time.monotonic() - began_s < 20.0
        assert counted("error") == 1
        version = await change_row(pool, tenant)
        await process.configurations.invalidate(tenant, version)
    finally:
        valkey.resume()
    assert process.cache._probe is not None
    async with asyncio.timeout(60):
        await process.cache._probe
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 60.0)
    # The invalidation did not reach Valkey, which still has what was stored before it hung.
    assert (await process.configurations.read(tenant)).version == version
    assert counted("outdated") == 1


async def test_a_store_that_was_stuck_on_its_way_comes_too_late(
    process: Reader, tenant: TenantId, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Valkey that hung the socket still holds what was sent; the lease is over by the time that it is read."""
    monkeypatch.setattr(tenant_cache, "LEASE_S", 0.001)
    found = await process.cache.read(tenant)
    assert found is not None
    assert found.lease is not None
    ends_ms = int(await client.hget(process.cache.key(tenant), "u"))
    async with asyncio.timeout(60):
        while (now := await client.time())[0] * 1000 + now[1] // 1000 <= ends_ms:
            pass
    assert not await process.cache.store(tenant, 1, b"late", found.lease)


async def test_a_tenant_that_the_database_refuses_is_told_to_all_who_ask(process: Reader) -> None:
    stranger = TenantId(uuid7(1))
    answers = await asyncio.gather(*(process.configurations.read(stranger) for _ in range(5)), return_exceptions=True)
    assert all(isinstance(answer, NotFoundError) for answer in answers)


async def test_a_connection_that_does_not_close_in_time_is_no_reason_to_fail(
    settings: Settings, tenant: TenantId, client: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 0.25)
    cache = TenantCache(settings, value_format=1)
    async with asyncio.timeout(60):
        while await cache.read(tenant) is None:
            await client.ping()  # a busy machine's Valkey may take longer than a cache waits

    async def never(_self: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(asyncio.StreamWriter, "wait_closed", never)
        await cache.close()
