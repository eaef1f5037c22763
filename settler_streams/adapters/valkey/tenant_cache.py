"""Tenants' configuration in Valkey: a copy that may be absent, refused or forgotten, and is never the authority.

One hash per tenant, ``<deployment>:tenant:{<tenant id>}``: the tenant's id is the hash tag, so whatever is ever kept
of one tenant lies in one slot of a cluster. Three scripts keep this rule, each in one atomic step: **what was read
before an invalidation, or before a flush, is not stored after it.** A reader that finds nothing gets a lease, which an
invalidation, a flush and its age end; a store needs the lease, and a version that is not below the one known. (Leases
against stale stores: Nishtala et al., Scaling Memcache at Facebook, NSDI 2013, section 3.2.1.)

Valkey is asked once, within :data:`ANSWER_DEADLINE_S`. When it does not answer it is left alone by all calls until a
probe in the background gets an answer: whoever asks meanwhile is told at once that there is none.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
from importlib import resources
from typing import Any, NamedTuple

import structlog
from redis.commands.core import AsyncScript

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey.connection import CONNECTIONS_MAX, UNANSWERED, connect, disconnect
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.settings import Settings

log = structlog.get_logger(__name__)

ANSWER_DEADLINE_S = 0.25
"""The longest that a call waits, connecting included: Postgres, which is asked instead, answers in milliseconds."""
PROBE_MIN_S, PROBE_MAX_S = 0.5, 5.0
"""Pauses between the probes of a Valkey that did not answer, doubling."""
TTL_S, TTL_JITTER = 300.0, 0.2
"""A value lives so long, give or take a fifth, so that what was stored together does not end together."""
TTL_MAX_S = TTL_S * (1 + TTL_JITTER)
"""No value is older than this."""
LEASE_S = 10.0
"""Longest time from a miss to its store: a pool's wait for a connection and a query."""
VALUE_BYTES_MAX = 16 * 1024
"""A larger configuration is read from Postgres each time. With the life of a value it bounds Valkey's memory: 100,000
tenants of a usual 400 bytes, all read within five minutes, take some 60 MB."""

_STORES = {b"stored": "stored", b"stale": "stale-write", b"lease": "lease-ended"}
"""What the script answers, and how the metric calls it."""
_VERSION = re.compile(rb"[1-9][0-9]{0,18}")


class Found(NamedTuple):
    """What Valkey answered: a value with the version that it is filed under, or a lease to store one with."""

    version: int
    value: bytes | None
    lease: bytes | None


class TenantCache:
    """One per process. ``value_format`` numbers the encoding of values: each format reads only its own."""

    def __init__(self, settings: Settings, *, value_format: int) -> None:
        self._prefix = f"{settings.deployment}:tenant"
        self._field = f"d{value_format}"
        self._client = connect(settings, deadline_s=ANSWER_DEADLINE_S)
        self._calls = asyncio.Semaphore(CONNECTIONS_MAX)
        self._read, self._store, self._invalidate = (
            self._client.register_script(_script(name)) for name in ("read", "store", "invalidate")
        )
        self._discard = self._client.register_script("return redis.call('DEL', KEYS[1])")
        self._probe: asyncio.Task[None] | None = None
        self._closing = False

    async def close(self) -> None:
        """Disconnect."""
        self._closing = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        await disconnect(self._client)

    @property
    def lost(self) -> bool:
        """Whether Valkey did not answer and is left alone for the time being."""
        return self._probe is not None and not self._probe.done()

    def key(self, tenant_id: TenantId) -> str:
        """Where the tenant's values lie. Raises ValueError when ``tenant_id`` is no UUID in canonical form."""
        return f"{self._prefix}:{{{canonical_tenant(tenant_id)}}}"

    async def read(self, tenant_id: TenantId) -> Found | None:
        """The value in this client's format, or a lease; None when Valkey did not answer."""
        new_lease = secrets.token_hex(8)
        answer = await self._ask(self._read, tenant_id, self._field, new_lease, _ms(LEASE_S), _ms(TTL_MAX_S))
        if answer is None:
            return None
        version, value, lease, foreign = answer
        if foreign:
            METRICS.tenant_cache("foreign")
        # A version that is none is told as 0, which no tenant has.
        return Found(int(version) if version is not None and _VERSION.fullmatch(version) else 0, value, lease)

    async def store(self, tenant_id: TenantId, version: int, value: bytes, lease: bytes) -> bool:
        """Keep ``value``, unless the lease has ended or a newer version is known. True: it is kept."""
        if len(value) > VALUE_BYTES_MAX:
            METRICS.tenant_cache("too-large")
            return False
        lives_s = TTL_S * random.uniform(1 - TTL_JITTER, 1 + TTL_JITTER)  # noqa: S311 - spreads work, keeps no secret
        answer = await self._ask(self._store, tenant_id, version, self._field, value, lease, _ms(lives_s))
        if answer is not None:
            METRICS.tenant_cache(_STORES[answer])
        return bool(answer == b"stored")

    async def invalidate(self, tenant_id: TenantId, version: int) -> bool:
        """Drop whatever is older than ``version`` and refuse it from here on; False when Valkey did not answer."""
        return await self._ask(self._invalidate, tenant_id, version, _ms(TTL_MAX_S)) is not None

    async def discard(self, tenant_id: TenantId) -> bool:
        """Drop whatever lies there; False when Valkey did not answer."""
        return await self._ask(self._discard, tenant_id) is not None

    async def _ask(self, script: AsyncScript, tenant_id: TenantId, *arguments: bytes | str | int) -> Any:
        key = self.key(tenant_id)
        if self.lost:
            METRICS.tenant_cache("lost")
            return None
        try:
            async with asyncio.timeout(ANSWER_DEADLINE_S), self._calls:
                return await script(keys=[key], args=arguments)
        except UNANSWERED as error:
            METRICS.tenant_cache("error")
            if not self.lost:
                log.warning("tenant cache lost: Postgres is asked instead", error=repr(error))
                self._probe = asyncio.create_task(self._until_it_answers(key), name="probe of the tenant cache")
            return None

    async def _until_it_answers(self, key: str) -> None:
        """Ask for the key that got no answer, since of a cluster it may be one node that is gone."""
        pause_s = PROBE_MIN_S
        while not self._closing:  # a client in the middle of an answer can lose the cancellation
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(ANSWER_DEADLINE_S):
                    await self._client.exists(key)
            except UNANSWERED:
                pause_s = min(2 * pause_s, PROBE_MAX_S)
            else:
                log.info("tenant cache answers again")
                return


def _script(name: str) -> str:
    return resources.files(__package__).joinpath(f"tenant_{name}.lua").read_text(encoding="utf-8")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
