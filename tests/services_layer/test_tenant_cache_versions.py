"""The cache's rule of versions, as a state machine: whatever happens in whatever order, nobody goes back in time.

Two processes read two tenants on a real PostgreSQL and a real Valkey, while rows change, events arrive late, readers
write back what they read long ago, Valkey forgets everything or comes back as it was (a failover that lost writes), and
somebody writes nonsense into its keys.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple, TypeVar

import asyncpg
import pytest
import redis.asyncio
from hypothesis import settings as properties
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.valkey import tenant_cache
from settler_streams.errors import NotFoundError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId
from settler_streams.services import TenantConfigurations
from settler_streams.services.tenant_configurations import decoded, encoded
from settler_streams.services.tenant_store import Tenant
from settler_streams.services.tenant_store import read as read_tenant
from settler_streams.settings import Settings
from tests.services.interface import Service, Services
from tests.services_layer.cached_tenants import Reader, change_row, insert_tenant, named, reader

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a history no event loop runs, and a quarter of a second can pass."""
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 60.0)


T = TypeVar("T")
READERS, TENANTS = st.integers(0, 1), st.integers(0, 1)


class Ground(NamedTuple):
    """What all examples share."""

    runner: asyncio.Runner
    settings: Settings
    pool: TenantConnectionPool
    owner: asyncpg.Connection
    valkey: redis.asyncio.Redis


@pytest.fixture(scope="module")
def ground(services: Services, postgres: Service, valkey: Service) -> Iterator[Ground]:
    token = secrets.token_hex(4)
    settings = services.settings.model_copy(update={"deployment": f"t-{token}", "db_name": f"t_{token}"})
    with asyncio.Runner() as runner:
        runner.run(migrate(settings))
        pool = runner.run(TenantConnectionPool.open(settings))
        owner = runner.run(asyncpg.connect(settings.postgres_url(owner=True)))
        client = redis.asyncio.Redis.from_url(settings.redis_url())
        yield Ground(runner, settings, pool, owner, client)
        for closing in (client.aclose(), owner.close(), pool.close()):
            runner.run(closing)


class SlowRead(NamedTuple):
    """A reader between the database and the cache."""

    reader: int
    tenant: Tenant
    lease: bytes


class Histories(RuleBasedStateMachine):
    """``seen``: what a reader was told of a tenant at most; ``marked``: the version that Valkey was told of."""

    ground: Ground

    def __init__(self) -> None:
        super().__init__()
        self.stack = AsyncExitStack()
        self.slow: list[SlowRead] = []

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.ground.runner.run(coroutine)

    @initialize()
    def begin(self) -> None:
        self.readers: list[Reader] = [
            self.run(self.stack.enter_async_context(reader(self.ground.settings, self.ground.pool))) for _ in range(2)
        ]
        self.tenants: list[TenantId] = [self.run(insert_tenant(self.ground.pool)) for _ in range(2)]
        self.newest = [1, 1]
        self.erased = [False, False]
        self.seen = [[1, 1], [1, 1]]
        self.marked = [0, 0]
        self.kept: dict[int, bytes | None] = {}
        for process in self.readers:
            for tenant_id in self.tenants:
                process.directory.hear(tenant_id, 1)

    def teardown(self) -> None:
        self.run(self.stack.aclose())

    def key(self, tenant: int) -> str:
        return self.readers[0].cache.key(self.tenants[tenant])

    @rule(tenant=TENANTS)
    def change(self, tenant: int) -> None:
        if not self.erased[tenant]:
            self.newest[tenant] = self.run(change_row(self.ground.pool, self.tenants[tenant]))

    @rule(tenant=TENANTS)
    def erase(self, tenant: int) -> None:
        if not self.erased[tenant]:
            for table, column in (("tenant_slugs", "tenant_id"), ("tenants", "id")):
                statement = f"DELETE FROM {table} WHERE {column} = $1"
                self.run(self.ground.owner.execute(statement, self.tenants[tenant]))
            self.newest[tenant] += 1
            self.erased[tenant] = True

    @rule(who=READERS, tenant=TENANTS)
    def acknowledge(self, who: int, tenant: int) -> None:
        """The process's own change."""
        version = self.newest[tenant]
        assert self.run(self.readers[who].configurations.invalidate(self.tenants[tenant], version))
        self.seen[who][tenant] = self.marked[tenant] = version

    @rule(who=READERS, tenant=TENANTS, chance=st.randoms(use_true_random=False))
    def hear(self, who: int, tenant: int, chance: Any) -> None:
        """Any event so far arrives, or arrives again."""
        version = chance.randint(1, self.newest[tenant])
        gone = self.erased[tenant] and version == self.newest[tenant]
        status = TenantStatus.DELETED if gone else TenantStatus.ACTIVE
        self.readers[who].directory.hear(self.tenants[tenant], version, status)
        self.seen[who][tenant] = max(self.seen[who][tenant], version)

    @rule(who=READERS, tenant=TENANTS)
    def read(self, who: int, tenant: int) -> None:
        seen = self.seen[who][tenant]
        try:
            found = self.run(self.readers[who].configurations.read(self.tenants[tenant]))
        except NotFoundError:
            assert self.erased[tenant]
            return
        last = self.newest[tenant] - self.erased[tenant]
        assert seen <= found.version <= last
        assert (found.id, found.name) == (self.tenants[tenant], named(found.version))
        assert list(found.quotas.values()) == [found.version]
        self.seen[who][tenant] = found.version

    @rule(who=READERS, tenant=TENANTS)
    def begin_slow_read(self, who: int, tenant: int) -> None:
        async def begin() -> None:
            found = await self.readers[who].cache.read(self.tenants[tenant])
            assert found is not None
            if found.lease is None:
                return
            async with self.ground.pool.tenant(self.tenants[tenant]) as tx:
                self.slow.append(SlowRead(who, await read_tenant(tx, self.tenants[tenant]), found.lease))

        if not self.erased[tenant]:
            self.run(begin())

    @rule()
    def end_slow_read(self) -> None:
        if self.slow:
            who, tenant, lease = self.slow.pop(0)
            self.run(self.readers[who].cache.store(tenant.id, tenant.version, encoded(tenant), lease))

    @rule()
    def flush(self) -> None:
        self.run(self.ground.valkey.flushall())

    @rule(tenant=TENANTS)
    def keep_copy(self, tenant: int) -> None:
        self.kept[tenant] = self.run(self.ground.valkey.dump(self.key(tenant)))

    @rule(tenant=TENANTS)
    def lose_writes(self, tenant: int) -> None:
        """As a replica that takes over and had not heard of the last ones."""
        if (copy := self.kept.get(tenant)) is not None:
            self.run(self.ground.valkey.restore(self.key(tenant), 300_000, copy, replace=True))
            self.marked[tenant] = 0

    @rule(tenant=TENANTS, what=st.sampled_from(["text", "torn", "other tenant", "no version", "zero", "huge"]))
    def foreign(self, tenant: int, what: str) -> None:
        async def write() -> None:
            client, key = self.ground.valkey, self.key(tenant)
            await client.delete(key)
            if what == "text":
                await client.set(key, "anything")
                return
            other = (await self.hash(1 - tenant))[1] or b"{}"
            versions = {"no version": "five", "zero": "0", "huge": "9" * 30}
            value = other if what == "other tenant" else b'["'
            await client.hset(key, mapping={"v": versions.get(what, "1"), "d1": value})

        self.run(write())

    @rule(who=READERS, deaf=st.booleans())
    def silence(self, who: int, deaf: bool) -> None:
        self.readers[who].directory.deaf = deaf

    @invariant()
    def nothing_older_than_what_valkey_was_told_of_is_stored(self) -> None:
        for tenant, marked in enumerate(getattr(self, "marked", [])):
            version, value = self.run(self.hash(tenant))
            if value is not None and decoded(self.tenants[tenant], int(version), value) is not None:
                assert int(version) >= marked

    async def hash(self, tenant: int) -> tuple[bytes, bytes | None]:
        client, key = self.ground.valkey, self.key(tenant)
        if await client.type(key) != b"hash":
            return b"0", None
        version, value = await client.hmget(key, "v", "d1")
        whole = version is not None and version.isdigit() and len(version) < 20
        return (version, value) if whole else (b"0", None)


def test_no_reader_goes_back_in_time(ground: Ground) -> None:
    class OnRealServices(Histories):
        pass

    OnRealServices.ground = ground
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        OnRealServices, settings=properties(max_examples=20, stateful_step_count=30)
    )


@pytest.mark.parametrize("forgetful", [False, True])
def test_the_machine_notices_a_cache_that_forgets_what_it_has_seen(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, forgetful: bool
) -> None:
    """So that the machine above proves something: a failover that lost an invalidation, without the comparison."""

    class OneHistory(Histories):
        pass

    OneHistory.ground = ground
    if forgetful:
        monkeypatch.setattr(TenantConfigurations, "_floor", lambda _self, _tenant: 0)
    history = OneHistory()
    try:
        history.begin()
        for _ in range(3):
            history.read(who=0, tenant=0)
        history.keep_copy(tenant=0)
        history.change(tenant=0)
        history.acknowledge(who=0, tenant=0)
        history.lose_writes(tenant=0)
        if forgetful:
            with pytest.raises(AssertionError):
                history.read(who=0, tenant=0)
        else:
            history.read(who=0, tenant=0)
    finally:
        history.teardown()
