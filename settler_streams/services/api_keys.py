"""API keys: ``sk_<tenant>_<secret>``, shown once, stored as a hash.

The secret has 256 random bits, so a fast hash keeps it as safe as a slow one would: there is nothing to guess. The
tenant stands in the key, so the database context exists before the look-up.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import hashlib
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import asyncpg

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import Disposition, InvalidRequestError, NotFoundError, SettlerError, UnavailableError
from settler_streams.events import TenantStatus, TenantTier
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import queries

SECRET_BYTES = 32
STRANGERS_AT_ONCE, STRANGERS_WAITING_MAX = 2, 50
"""Look-ups of keys that this process does not know: a flood of made-up keys gets two connections of the pool, and 50
look-ups of a millisecond each keep nobody waiting long."""
KNOWN_MAX = 100_000
"""Hashes of keys remembered, those of the latest requests; about 10 MB."""

_KEY = re.compile(r"sk_([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})_[A-Za-z0-9_-]{43}")


class AuthenticationError(SettlerError):
    """The API key is malformed, unknown, expired or revoked; which of them is not said."""

    disposition = Disposition.REFUSE

    def __init__(self) -> None:
        super().__init__("the API key is not valid")


class Scope(enum.StrEnum):
    """What a key may do."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    USAGE_WRITE = "usage:write"
    FLAGS_READ = "flags:read"
    FLAGS_WRITE = "flags:write"


@dataclass(frozen=True, slots=True)
class IssuedApiKey:
    """A new key. ``key`` exists only here: whoever loses it has to issue another."""

    id: str
    tenant_id: TenantId
    scopes: frozenset[Scope]
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a valid key speaks for."""

    tenant_id: TenantId
    root_id: TenantId
    tier: TenantTier
    status: TenantStatus
    key_id: str
    scopes: frozenset[str]

    @property
    def actor(self) -> str:
        """How audit entries name it."""
        return f"api-key:{self.key_id}"


class ApiKeys:
    """Issues, revokes and recognises keys."""

    def __init__(self, pool: TenantConnectionPool) -> None:
        self._pool = pool
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._strangers = asyncio.Semaphore(STRANGERS_AT_ONCE)
        self._strangers_waiting = 0

    async def issue(
        self,
        tenant_id: TenantId,
        scopes: Iterable[Scope | str],
        *,
        name: str = "default",
        expires_at: dt.datetime | None = None,
        actor: str = "platform",
    ) -> IssuedApiKey:
        """Make a key; audited in the same transaction.

        Raises:
            InvalidRequestError: a scope does not exist.
            NotFoundError: there is no such tenant.
        """
        try:
            granted = frozenset(Scope(scope) for scope in scopes)
        except ValueError as error:
            raise InvalidRequestError(f"{error}; there are {', '.join(Scope)}") from error
        key = f"sk_{tenant_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        key_id = uuid7(time.time_ns() // 1_000_000)
        after = json.dumps({"name": name, "scopes": sorted(granted)})
        try:
            async with self._pool.tenant(tenant_id) as tx:
                await tx.execute(
                    queries.INSERT_API_KEY, tenant_id, key_id, _hash(key), name, sorted(granted), expires_at
                )
                await tx.execute(
                    queries.INSERT_AUDIT_ENTRY,
                    tenant_id, key_id, actor, "api-key.issued", f"api-key/{key_id}", None, after, None,
                )  # fmt: skip
        except asyncpg.ForeignKeyViolationError as error:
            raise NotFoundError(f"no tenant {tenant_id}") from error
        return IssuedApiKey(key_id, tenant_id, granted, key)

    async def revoke(self, tenant_id: TenantId, key_id: str, *, actor: str = "platform") -> None:
        """End a key; the next request that carries it is refused.

        Raises:
            NotFoundError: the tenant has no such key in force.
        """
        entry_id = uuid7(time.time_ns() // 1_000_000)
        async with self._pool.tenant(tenant_id) as tx:
            if not await tx.fetchval(queries.REVOKE_API_KEY, tenant_id, key_id):
                raise NotFoundError(f"tenant {tenant_id} has no key {key_id} in force")
            await tx.execute(
                queries.INSERT_AUDIT_ENTRY,
                tenant_id, entry_id, actor, "api-key.revoked", f"api-key/{key_id}", None, None, None,
            )  # fmt: skip

    async def authenticate(self, api_key: str) -> Principal:
        """Whom the key speaks for. Every request asks the database, so a revoked key is refused at once.

        Raises:
            AuthenticationError: it is not a key in force of a tenant that exists.
            UnavailableError: too many keys that are new here are being looked up.
        """
        match = _KEY.fullmatch(api_key)
        if match is None:
            raise AuthenticationError
        tenant_id = TenantId(match[1])
        key_hash = _hash(api_key)
        async with self._door(key_hash), self._pool.tenant(tenant_id) as tx:
            row = await tx.fetchrow(queries.FIND_API_KEY, tenant_id, key_hash)
        if row is None:
            self._known.pop(key_hash, None)
            raise AuthenticationError
        self._remember(key_hash)
        return Principal(
            tenant_id=tenant_id,
            root_id=TenantId(str(row["root_id"])),
            tier=TenantTier(row["tier"]),
            status=TenantStatus(row["status"]),
            key_id=str(row["id"]),
            scopes=frozenset(row["scopes"]),
        )

    @asynccontextmanager
    async def _door(self, key_hash: bytes) -> AsyncIterator[None]:
        """Open to a key that was valid here before; narrow for all others together."""
        if key_hash in self._known:
            yield
            return
        if self._strangers_waiting >= STRANGERS_WAITING_MAX:
            raise UnavailableError("too many unknown API keys are being looked up; try again later")
        self._strangers_waiting += 1
        try:
            async with self._strangers:
                yield
        finally:
            self._strangers_waiting -= 1

    def _remember(self, key_hash: bytes) -> None:
        self._known[key_hash] = None
        self._known.move_to_end(key_hash)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
