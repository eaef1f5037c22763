"""The rate limit in Valkey: exact, all limits or none, shared by all gateways, and bounded when Valkey is gone."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from settler_streams.adapters.valkey import rate_limit
from settler_streams.adapters.valkey.rate_limit import GATEWAYS_MAX, Limit, ValkeyRateLimiter
from settler_streams.errors import ConfigurationError, InvalidRequestError
from settler_streams.ids import TenantId, uuid7
from settler_streams.settings import Settings
from tests.services.interface import Service, Services

pytestmark = pytest.mark.services


def _tenant() -> TenantId:
    return TenantId(uuid7(1))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is enough for a gateway, and not for every machine that runs tests: beyond it nothing is shared."""
    monkeypatch.setattr(rate_limit, "ANSWER_DEADLINE_S", 60.0)


@pytest.fixture
def settings(services: Services, valkey: Service) -> Settings:
    return services.settings.model_copy(update={"deployment": f"t-{secrets.token_hex(4)}"})


@pytest_asyncio.fixture
async def limiter(settings: Settings) -> AsyncIterator[ValkeyRateLimiter]:
    limiter = ValkeyRateLimiter(settings, "http")
    yield limiter
    await limiter.close()


@pytest_asyncio.fixture
async def client(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.redis_url(), decode_responses=True)
    yield client
    await client.aclose()


async def _dump(client: redis.asyncio.Redis, root: TenantId) -> dict[str, Any]:
    keys = [key async for key in client.scan_iter(f"*{{{root}}}*")]
    return {key: (await client.hgetall(key), await client.pexpiretime(key)) for key in keys}


async def test_a_burst_and_not_one_more_over_several_gateways(settings: Settings) -> None:
    tenant, gateways = _tenant(), [ValkeyRateLimiter(settings, "http") for _ in range(3)]
    limit = Limit(tenant, rate_per_minute=1, burst=20)
    verdicts = await asyncio.gather(*(gateways[n % 3].take(tenant, [limit]) for n in range(60)))
    assert sum(v.allowed for v in verdicts) == 20
    assert all(v.shared for v in verdicts)
    assert sorted(v.remaining for v in verdicts if v.allowed) == list(range(20))
    refused = next(v for v in verdicts if not v.allowed)
    assert refused.retry_after_ms is not None
    assert 30_000 < refused.retry_after_ms <= 60_000
    for gateway in gateways:
        await gateway.close()


async def test_a_denial_writes_nothing(limiter: ValkeyRateLimiter, client: redis.asyncio.Redis) -> None:
    child, root = _tenant(), _tenant()
    limits = [Limit(child, 1, 5), Limit(root, 1, 2)]
    assert (await limiter.take(root, limits, cost=2)).allowed
    before = await _dump(client, root)
    assert len(before) == 2
    refused = await limiter.take(root, limits)
    assert (refused.allowed, refused.limit.tenant_id) == (False, root)
    assert await _dump(client, root) == before, "neither the root's bucket nor the child's"
    fresh = _tenant()
    assert not (await limiter.take(fresh, [Limit(fresh, 1, 1)], cost=2)).allowed
    assert await _dump(client, fresh) == {}


async def test_the_wait_is_what_it_takes(limiter: ValkeyRateLimiter) -> None:
    tenant = _tenant()
    limit = Limit(tenant, rate_per_minute=30, burst=1)
    assert (await limiter.take(tenant, [limit])).allowed
    refused = await limiter.take(tenant, [limit])
    assert refused.retry_after_ms is not None
    assert 0 < refused.retry_after_ms <= 2_000
    asked_early = 0
    async with asyncio.timeout(60):
        while not (verdict := await limiter.take(tenant, [limit])).allowed:
            assert verdict.retry_after_ms is not None
            assert verdict.retry_after_ms <= refused.retry_after_ms
            asked_early += 1
    assert asked_early > 0


async def test_what_can_never_pass_says_so(limiter: ValkeyRateLimiter) -> None:
    tenant = _tenant()
    assert (await limiter.take(tenant, [Limit(tenant, 60, 3)], cost=4)).retry_after_ms is None
    dry = Limit(tenant, 0, 3)
    assert (await limiter.take(tenant, [dry], cost=3)).allowed
    assert (await limiter.take(tenant, [dry])).retry_after_ms is None


async def test_the_largest_numbers_stay_exact(limiter: ValkeyRateLimiter, client: redis.asyncio.Redis) -> None:
    tenant = _tenant()
    limit = Limit(tenant, rate_per_minute=0, burst=10**10)
    assert (await limiter.take(tenant, [limit])).remaining == 10**10 - 1
    assert (await limiter.take(tenant, [limit], cost=7)).remaining == 10**10 - 8
    ((stored, _expiry),) = (await _dump(client, tenant)).values()
    assert int(stored["l"]) == (10**10 - 8) * 60_000


async def test_a_new_policy_cuts_at_once_and_gives_no_burst(limiter: ValkeyRateLimiter) -> None:
    tenant = _tenant()
    assert (await limiter.take(tenant, [Limit(tenant, 1, 100)])).remaining == 99
    assert (await limiter.take(tenant, [Limit(tenant, 1, 10)])).remaining == 9
    assert (await limiter.take(tenant, [Limit(tenant, 1, 1000)])).remaining == 8


async def test_an_idle_bucket_is_forgotten_when_it_is_full(
    limiter: ValkeyRateLimiter, client: redis.asyncio.Redis
) -> None:
    tenant = _tenant()
    await limiter.take(tenant, [Limit(tenant, 60, 100)], cost=100)
    ((stored, expires_ms),) = (await _dump(client, tenant)).values()
    assert 90_000 < expires_ms - int(stored["t"]) <= 100_001


@pytest.mark.parametrize("wrong", [(-1, 1), (1, 0), (10**10 + 1, 1), (1, 10**10 + 1)])
def test_impossible_limits(wrong: tuple[int, int]) -> None:
    with pytest.raises(ConfigurationError):
        Limit(_tenant(), *wrong)


async def test_a_request_that_costs_nothing_is_refused(limiter: ValkeyRateLimiter) -> None:
    tenant = _tenant()
    for limits, cost in (([Limit(tenant, 1, 1)], 0), ([], 1)):
        with pytest.raises(InvalidRequestError):
            await limiter.take(tenant, limits, cost)


async def test_without_valkey_a_share_that_starts_empty(settings: Settings, valkey: Service) -> None:
    clock = [0]
    limiter = ValkeyRateLimiter(settings, "http", clock_ms=lambda: clock[0])
    tenant = _tenant()
    limit = Limit(tenant, rate_per_minute=60 * GATEWAYS_MAX, burst=2 * GATEWAYS_MAX)
    assert (await limiter.take(tenant, [limit])).shared
    valkey.kill()
    try:
        verdict = await limiter.take(tenant, [limit])
        assert (verdict.allowed, verdict.shared, verdict.retry_after_ms) == (False, False, 1000)
        assert not (await limiter.take(tenant, [limit])).allowed
        admitted = 0
        for clock[0] in range(0, 20_000, 100):
            admitted += (await limiter.take(tenant, [limit])).allowed
        assert admitted == 19, "one a second: a sixteenth of the rate"
        closed = await limiter.take(tenant, [limit, Limit(_tenant(), 10**6, 10**6, fail_closed=True)])
        assert (closed.allowed, closed.shared) == (False, False)
    finally:
        valkey.start()
    clock[0] += 10_000
    again = await limiter.take(tenant, [limit])
    assert (again.allowed, again.shared) == (True, True)
    await limiter.close()


async def test_a_valkey_that_hangs_costs_one_deadline_a_second(
    settings: Settings, valkey: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    limiter = ValkeyRateLimiter(settings, "http")
    tenant = _tenant()
    limit = Limit(tenant, 60, 10)
    assert (await limiter.take(tenant, [limit])).shared
    monkeypatch.setattr(rate_limit, "ANSWER_DEADLINE_S", 1.0)
    valkey.pause()
    try:
        async with asyncio.timeout(20):
            verdicts = [await limiter.take(tenant, [limit]) for _ in range(200)]
    finally:
        valkey.resume()
    assert not any(v.shared for v in verdicts)
    await limiter.close()
