"""The tenant cache, the rate limit and an erasure's look for keys on a real cluster: a slot that moves, a master that
dies, slots without one."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio
from pydantic import SecretStr
from redis.crc import key_slot

from settler_streams.adapters.valkey import rate_limit, tenant_cache, tenant_keys
from settler_streams.adapters.valkey.connection import connect
from settler_streams.adapters.valkey.rate_limit import Limit, ValkeyRateLimiter
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.adapters.valkey.tenant_keys import TenantKeys
from settler_streams.dev.stack.ports import free_port
from settler_streams.dev.stack.state import write_private
from settler_streams.dev.stack.valkey import Valkey
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, uuid7
from settler_streams.settings import Settings

pytestmark = pytest.mark.services

SLOTS = 16_384
MASTERS = 3
SETTLED_WITHIN_S = 60.0


class Node(Valkey):
    """A server in cluster mode. A master that is silent for a second counts as failed."""

    def __init__(self, home: Path, port: int, password: str, bus_port: int) -> None:
        super().__init__(home, port, password)
        self.password = password
        self._bus_port = bus_port

    def prepare(self) -> None:
        super().prepare()
        path = self.home / "valkey.conf"
        more = f"cluster-enabled yes\ncluster-port {self._bus_port}\ncluster-node-timeout 1000\n"
        write_private(path, path.read_bytes() + f'{more}masterauth "{self.password}"\n'.encode())

    def client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis(host="127.0.0.1", port=self.port, password=self.password, decode_responses=True)


async def _ask(node: Node, *command: str | int) -> str:
    client = node.client()
    try:
        return str(await client.execute_command(*command))
    finally:
        await client.aclose()


async def _until(node: Node, command: tuple[str, ...], expected: str) -> None:
    async with asyncio.timeout(SETTLED_WITHIN_S):
        while expected not in await _ask(node, *command):
            pass


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    password, taken = secrets.token_hex(8), set[int]()
    nodes = []
    for number in range(MASTERS + 1):
        ports = [free_port(taken), 0]
        taken.add(ports[0])
        ports[1] = free_port(taken)
        taken.add(ports[1])
        nodes.append(Node(tmp_path_factory.mktemp(f"node{number}"), ports[0], password, ports[1]))
    try:
        for node in nodes:
            node.start()
        for node in nodes:
            node.wait_ready()
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@pytest_asyncio.fixture(scope="module")
async def nodes(processes: list[Node]) -> list[Node]:
    """Three masters with a third of the slots each, and a replica of the first, that know each other."""
    first, replica = processes[0], processes[-1]
    for number, node in enumerate(processes[:MASTERS]):
        begin, end = number * SLOTS // MASTERS, (number + 1) * SLOTS // MASTERS - 1
        await _ask(node, "CLUSTER", "ADDSLOTSRANGE", begin, end)
        await _ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
    for node in processes[1:]:
        await _ask(node, "CLUSTER", "MEET", "127.0.0.1", first.port, first._bus_port)
    for node in processes:
        await _until(node, ("CLUSTER", "INFO"), "cluster_state:ok")
        await _until(node, ("CLUSTER", "INFO"), f"cluster_known_nodes:{len(processes)}")
    await _ask(replica, "CLUSTER", "REPLICATE", await _ask(first, "CLUSTER", "MYID"))
    await _until(replica, ("INFO", "replication"), "'master_link_status': 'up'")
    return processes


@pytest.fixture
def settings(nodes: list[Node]) -> Settings:
    """Only one node is named, the second: the others are learned from it."""
    return Settings(
        redis_host="127.0.0.1",
        redis_port=nodes[1].port,
        redis_password=SecretStr(nodes[1].password),
        redis_cluster=True,
        deployment=f"t-{secrets.token_hex(4)}",
    )


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 10.0)
    monkeypatch.setattr(rate_limit, "ANSWER_DEADLINE_S", 10.0)


@pytest_asyncio.fixture
async def cache(settings: Settings) -> AsyncIterator[TenantCache]:
    cache = TenantCache(settings, value_format=1)
    yield cache
    await cache.close()


def _tenant_of(cache: TenantCache, place: int) -> TenantId:
    """A tenant whose slot is the ``place``-th master's."""
    while True:
        tenant_id = TenantId(uuid7(1))
        if key_slot(cache.key(tenant_id).encode()) * MASTERS // SLOTS == place:
            return tenant_id


async def _stored(cache: TenantCache, tenant_id: TenantId, version: int, value: bytes) -> bool:
    found = await cache.read(tenant_id)
    assert found is not None
    assert found.lease is not None
    return await cache.store(tenant_id, version, value, found.lease)


async def _keys_with(node: Node, text: str) -> set[str]:
    """What lies on one node, a replica too, of the keys that contain ``text``."""
    async with aclosing(node.client()) as client:
        return {key async for key in client.scan_iter(match=f"*{text}*")}


async def _nowhere(nodes: list[Node], text: str) -> None:
    """Until the replica has followed; a master has nothing at once."""
    for node in nodes[:MASTERS]:
        assert await _keys_with(node, text) == set()
    async with asyncio.timeout(SETTLED_WITHIN_S):
        while await _keys_with(nodes[-1], text):
            pass


async def test_tenants_lie_on_all_masters(cache: TenantCache, nodes: list[Node]) -> None:
    tenants = [_tenant_of(cache, place) for place in range(MASTERS) for _ in range(10)]
    assert await _stored(cache, _tenant_of(cache, 0), 1, b"one")  # the client gets to know the cluster
    assert all(await asyncio.gather(*(_stored(cache, tenant, 1, b"one") for tenant in tenants)))
    for tenant in tenants:
        found = await cache.read(tenant)
        assert found is not None
        assert (found.version, found.value) == (1, b"one")
    for node in nodes[:MASTERS]:
        assert int(await _ask(node, "DBSIZE")) >= 10
    assert not cache.lost


async def test_more_callers_than_connections_wait_for_each_other(cache: TenantCache) -> None:
    tenant = _tenant_of(cache, 0)
    await _stored(cache, tenant, 1, b"one")
    found = await asyncio.gather(*(cache.read(tenant) for _ in range(300)))
    assert {one.value for one in found if one is not None} == {b"one"}
    assert not cache.lost


async def test_limits_of_one_root_are_charged_together(settings: Settings) -> None:
    limiter = ValkeyRateLimiter(settings, "http")
    for _ in range(10):
        root, child = TenantId(uuid7(1)), TenantId(uuid7(2))
        verdict = await limiter.take(root, [Limit(child, 60, 10), Limit(root, 60, 5)])
        assert (verdict.allowed, verdict.remaining, verdict.shared) == (True, 4, True)
    await limiter.close()


async def _move_slot(nodes: list[Node], key: str, target: Node) -> None:
    """The key's slot, in which nothing lies, to another master."""
    slot, name = key_slot(key.encode()), await _ask(target, "CLUSTER", "MYID")
    for node in (target, *(node for node in nodes[:MASTERS] if node is not target)):
        await _ask(node, "CLUSTER", "SETSLOT", slot, "NODE", name)


@pytest_asyncio.fixture
async def keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TenantKeys]:
    """What an erasure empties the cache with, one answer after the other for each node."""
    monkeypatch.setattr(tenant_keys, "SCAN_KEYS", 5)
    keys = TenantKeys(settings)
    yield keys
    await keys.close()


async def test_an_erasure_finds_the_tenants_keys_on_every_master(
    cache: TenantCache, keys: TenantKeys, settings: Settings, nodes: list[Node]
) -> None:
    root, tenant, child, other = (_tenant_of(cache, place) for place in (0, 1, 2, 1))
    for each in (root, tenant, child, other, *(_tenant_of(cache, n % MASTERS) for n in range(60))):
        assert await _stored(cache, each, 1, b"one")
    async with aclosing(connect(settings, deadline_s=SETTLED_WITHIN_S)) as client:
        for policy in ("http", "later"):
            limiter = ValkeyRateLimiter(settings, policy)
            await limiter.take(root, [Limit(tenant, 1, 9), Limit(other, 1, 9), Limit(root, 1, 9)], cost=5)
            await limiter.take(tenant, [Limit(child, 1, 9)], cost=5)
            await limiter.close()
        for place, named in enumerate((tenant, other)):
            for kind in range(20):  # of a release to come: without a slot of the tenant's own
                await client.sadd(f"{settings.deployment}:kind-{kind}:{named}:{place}", "x")
        await client.set(f"{settings.deployment}-2:tenant:{{{tenant}}}", "another deployment's")
    its = [await _keys_with(node, f"{settings.deployment}:*{tenant}") for node in nodes[:MASTERS]]
    assert all(its)
    before = set().union(*[await _keys_with(node, f"{settings.deployment}*:") for node in nodes[:MASTERS]])
    assert {key.decode() for key in await keys.find(tenant)} == set().union(*its)
    assert await keys.delete(tenant) == sum(map(len, its)) == 1 + 2 + 2 + 20
    await _nowhere(nodes, f"{settings.deployment}:*{tenant}")
    left = set().union(*[await _keys_with(node, f"{settings.deployment}*:") for node in nodes[:MASTERS]])
    assert left == before - set().union(*its)
    assert len(left) > 60 + 20
    assert await keys.delete(tenant) == 0


async def test_an_erasure_follows_a_slot_that_moved(
    cache: TenantCache, keys: TenantKeys, settings: Settings, nodes: list[Node]
) -> None:
    tenant, other = _tenant_of(cache, 0), _tenant_of(cache, 0)
    assert await keys.find(tenant) == []  # the client knows the cluster as it was
    await _move_slot(nodes, cache.key(tenant), nodes[2])
    for each in (tenant, other):
        assert await _stored(cache, each, 1, b"one")
    assert await _keys_with(nodes[2], tenant)
    assert await keys.delete(tenant) == 1
    await _nowhere(nodes, tenant)
    assert await _keys_with(nodes[0], other)


async def test_a_slot_that_moved_is_followed(cache: TenantCache, nodes: list[Node]) -> None:
    tenant = _tenant_of(cache, 1)
    assert await cache.discard(tenant)
    await _move_slot(nodes, cache.key(tenant), nodes[2])
    assert await _stored(cache, tenant, 1, b"one")
    assert await _ask(nodes[2], "HGET", cache.key(tenant), "d1") == "one"
    assert not cache.lost


async def test_a_master_that_dies_is_replaced_and_a_slot_without_one_is_lost(
    cache: TenantCache, keys: TenantKeys, settings: Settings, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one test, since the first half cannot be undone."""
    tenant, erased = _tenant_of(cache, 0), _tenant_of(cache, 0)
    assert await _stored(cache, erased, 1, b"one")
    assert len(await keys.find(erased)) == 1  # by a client that knows the master that dies
    assert await _stored(cache, tenant, 1, b"one")
    client = nodes[0].client()
    assert await client.wait(1, 10_000) == 1
    await client.aclose()
    monkeypatch.setattr(tenant_cache, "ANSWER_DEADLINE_S", 1.0)
    nodes[0].kill()
    await cache.invalidate(tenant, 2)  # may or may not get through, and returns either way
    await _until(nodes[-1], ("INFO", "replication"), "'role': 'master'")
    await _until(nodes[1], ("CLUSTER", "INFO"), "cluster_state:ok")
    if cache._probe is not None:
        async with asyncio.timeout(SETTLED_WITHIN_S):
            await cache._probe
    assert await cache.invalidate(tenant, 3)
    assert await _stored(cache, tenant, 3, b"three")
    assert await _ask(nodes[-1], "HGET", cache.key(tenant), "d1") == "three"
    assert await keys.delete(erased) == 1
    assert await _keys_with(nodes[-1], f"{settings.deployment}:") == {cache.key(tenant)}
    nodes[-1].kill()
    assert await cache.read(tenant) is None
    assert cache.lost
    with pytest.raises(UnavailableError, match="Valkey did not answer"):
        await keys.find(tenant)  # not that nothing is left, as the other masters would say
