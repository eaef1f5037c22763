"""The gateway's rate limit: token buckets in Valkey, shared by every gateway, all limits of a request in one step.

While Valkey answers, the requests admitted under one limit in any window of ``D`` ms are at most
``burst + rate * D / 60000``, whatever the number of gateways. A denial writes nothing.

When Valkey does not answer, a limit either refuses (``fail_closed``) or each gateway goes on with a share of
``1 / GATEWAYS_MAX`` that starts empty. All shares together admit at most ``rate * D' / 60000`` in an outage of ``D'``
ms; as Valkey's own bucket refills meanwhile, a window that holds an outage admits at most
``burst + rate * (D + D') / 60000``, and one ``burst`` more for each restart in which Valkey loses its memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import structlog

from settler_streams.adapters.valkey.connection import CONNECTIONS_MAX, UNANSWERED, connect, disconnect
from settler_streams.core.token_bucket import Bucket, RatePolicy, empty, take_all
from settler_streams.errors import ConfigurationError, InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.settings import Settings

log = structlog.get_logger(__name__)

GATEWAYS_MAX = 16
"""Gateways that may share the limits during an outage of Valkey: more of them would admit more than the limit."""
ANSWER_DEADLINE_S = 1.0
"""The longest that a request waits, connecting included. A healthy Valkey answers in under a millisecond, but a busy
gateway must not mistake its own slowness for Valkey's."""
LOST_FOR_S = 1.0
"""After a failure Valkey is left alone for so long, so that not every request waits for the deadline."""
SHARES_MAX = 10_000
"""Local buckets kept during an outage, the least recently used forgotten first. A forgotten one starts empty again."""
RATE_MAX = BURST_MAX = 10**10
"""Bounds within which the script's arithmetic is exact."""

_SCRIPT = resources.files(__package__).joinpath("take.lua").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Limit:
    """One bucket to charge: whose, and under which policy.

    Raises:
        ConfigurationError: a number is beyond what the script can count exactly, or the bucket could hold no token.
    """

    tenant_id: TenantId
    rate_per_minute: int
    burst: int
    fail_closed: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.rate_per_minute <= RATE_MAX and 1 <= self.burst <= BURST_MAX):
            raise ConfigurationError(f"{self} lies beyond 0..{RATE_MAX} per minute with a burst of 1..{BURST_MAX}")


@dataclass(frozen=True, slots=True)
class RateVerdict:
    """The answer to one request.

    ``remaining`` counts the whole tokens of the limit with the fewest; ``limit`` is that one, or the one that refused.
    ``retry_after_ms`` is when the request would pass if nothing else were charged; None means never. ``shared`` is
    False when Valkey did not answer and the gateway decided alone.
    """

    allowed: bool
    limit: Limit
    remaining: int
    retry_after_ms: int | None
    shared: bool


class ValkeyRateLimiter:
    """Buckets of one policy. ``clock_ms`` paces only the local shares; shared buckets go by Valkey's clock."""

    def __init__(
        self,
        settings: Settings,
        policy: str,
        *,
        clock_ms: Callable[[], int] = lambda: time.monotonic_ns() // 1_000_000,
    ) -> None:
        self._prefix = f"{settings.deployment}:rate:{policy}"
        self._clock_ms = clock_ms
        self._client = connect(settings, deadline_s=ANSWER_DEADLINE_S)
        self._calls = asyncio.Semaphore(CONNECTIONS_MAX)
        self._take = self._client.register_script(_SCRIPT)
        self._shares: OrderedDict[TenantId, Bucket] = OrderedDict()
        self._lost_until_ms: int | None = None

    async def close(self) -> None:
        """Disconnect."""
        await disconnect(self._client)

    async def take(self, root: TenantId, limits: Sequence[Limit], cost: int = 1) -> RateVerdict:
        """Charge ``cost`` tokens to every limit, or to none. ``root`` is the root tenant of all of them.

        Raises:
            InvalidRequestError: ``cost`` is below one token, or there is no limit to charge.
        """
        if cost < 1 or not limits:
            raise InvalidRequestError(f"{cost} tokens cannot be charged to {len(limits)} limits")
        now_ms = self._clock_ms()
        if self._lost_until_ms is None or now_ms >= self._lost_until_ms:
            try:
                answer = await self._ask(root, limits, cost)
            except UNANSWERED as error:
                if self._lost_until_ms is None:
                    log.warning("rate limits are decided alone: Valkey does not answer", error=repr(error))
                now_ms = self._clock_ms()
                self._lost_until_ms = now_ms + int(LOST_FOR_S * 1000)
            else:
                if self._lost_until_ms is not None:
                    log.info("rate limits are shared again")
                    self._lost_until_ms = None
                    self._shares.clear()
                return _verdict(limits, answer)
        return self._decide_alone(limits, cost, now_ms)

    async def _ask(self, root: TenantId, limits: Sequence[Limit], cost: int) -> list[int]:
        # The braces keep a root tenant's keys in one slot of a cluster, where one script may touch them all.
        keys = [f"{self._prefix}:{{{root}}}:{limit.tenant_id}" for limit in limits]
        arguments: list[int] = [cost]
        for limit in limits:
            arguments += (limit.rate_per_minute, limit.burst)
        async with asyncio.timeout(ANSWER_DEADLINE_S), self._calls:
            answer: Any = await self._take(keys=keys, args=arguments)
        return [int(number) for number in answer]

    def _decide_alone(self, limits: Sequence[Limit], cost: int, now_ms: int) -> RateVerdict:
        for limit in limits:
            if limit.fail_closed:
                return RateVerdict(False, limit, 0, int(LOST_FOR_S * 1000), False)
        policies = [
            RatePolicy(limit.rate_per_minute // GATEWAYS_MAX, max(1, limit.burst // GATEWAYS_MAX)) for limit in limits
        ]
        buckets = [self._shares.get(limit.tenant_id) or empty(now_ms) for limit in limits]
        after, verdict = take_all(buckets, policies, cost, now_ms)
        for limit, bucket in zip(limits, after, strict=True):
            self._shares[limit.tenant_id] = bucket
            self._shares.move_to_end(limit.tenant_id)
        while len(self._shares) > SHARES_MAX:
            self._shares.popitem(last=False)
        limit = limits[max(0, verdict.denied_by)]
        return RateVerdict(verdict.allowed, limit, verdict.remaining, verdict.retry_after_ms, False)


def _verdict(limits: Sequence[Limit], answer: Sequence[int]) -> RateVerdict:
    allowed, denied_by, remaining, waits = answer[0] == 1, answer[1], answer[2::2], answer[3::2]
    place = min(range(len(limits)), key=lambda i: remaining[i]) if allowed else denied_by
    wait_ms = None if waits[place] < 0 else waits[place]
    return RateVerdict(allowed, limits[place], remaining[place], wait_ms, True)
