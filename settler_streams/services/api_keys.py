"""API keys: ``sk_<tenant>_<secret>``, shown once, stored as a hash; each has scopes, and an end if it is given one.

The secret has 256 random bits, so a fast hash keeps it as safe as a slow one would: there is nothing to guess. The
tenant stands in the key, so the database context exists before the look-up.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import hashlib
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import Disposition, InvalidRequestError, NotFoundError, SettlerError, UnavailableError
from settler_streams.events import TenantStatus, TenantTier
from settler_streams.ids import TenantId, canonical_tenant, uuid7
from settler_streams.services import audit, queries, tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.principal import Principal

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

__all__ = ["ApiKey", "ApiKeys", "AuthenticationError", "IssuedApiKey", "Principal", "Scope"]

SECRET_BYTES = 32
STRANGERS_AT_ONCE, STRANGERS_WAITING_MAX = 2, 50
"""Look-ups of keys that this process does not know: a flood of made-up keys gets two connections of the pool, and 50
look-ups of a millisecond each keep nobody waiting long."""
KNOWN_MAX = 100_000
"""Hashes of keys remembered, those of the latest requests; about 10 MB."""

KEYS_MAX = 1_000
"""Of one answer; the next one starts behind its last."""
OVERLAP = dt.timedelta(days=1)
OVERLAP_MAX = dt.timedelta(days=30)
"""How long a key that is replaced still holds: until whoever uses it has been given the new one."""
NAME_CHARS_MAX = 200

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
    expires_at: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as stored, without its hash."""

    id: str
    tenant_id: TenantId
    name: str
    scopes: frozenset[Scope]
    created_at: dt.datetime
    expires_at: dt.datetime | None
    revoked_at: dt.datetime | None

    def in_force(self, now: dt.datetime) -> bool:
        """Whether a request with it is accepted at ``now``."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


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
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> IssuedApiKey:
        """Make a key; audited, and a version more of the tenant, in the same transaction.

        Raises:
            ConflictError: the tenant was deleted.
            InvalidRequestError: a scope does not exist, the name is empty or too long, or the end is not ahead.
            NotFoundError: there is no such tenant.
        """
        granted = _scopes(scopes)
        if not 1 <= len(name) <= NAME_CHARS_MAX:
            raise InvalidRequestError(f"a key's name has 1 to {NAME_CHARS_MAX} characters")
        _require_ahead(expires_at)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            return await _issue(tx, tenant_id, granted, name, expires_at, actor, request_id)

    async def list(self, tenant_id: TenantId, *, after: str | None = None, limit: int = 100) -> list[ApiKey]:
        """The tenant's keys in the order in which they were made, those no longer in force among them.

        Raises:
            InvalidRequestError: ``limit`` is not between 1 and :data:`KEYS_MAX`, or ``after`` is no id.
            NotFoundError: there is no such tenant.
        """
        if not 1 <= limit <= KEYS_MAX:
            raise InvalidRequestError(f"an answer has 1 to {KEYS_MAX} keys")
        behind = None if after is None else _key_id(after)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.read(tx, tenant_id)
            rows = await tx.fetch(queries.API_KEYS_AFTER, tenant_id, behind, limit)
        return [_stored(tenant_id, row) for row in rows]

    async def change_scopes(
        self,
        tenant_id: TenantId,
        key_id: str,
        scopes: Iterable[Scope | str],
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> ApiKey:
        """Let a key in force do exactly this from its next request on. Errors as :meth:`issue` and :meth:`revoke`."""
        granted = _scopes(scopes)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await _read(tx, tenant_id, key_id)
            after = replace(before, scopes=granted)
            await _update(tx, before, after, "api-key.scopes-changed", actor, request_id)
        return after

    async def change_expiry(
        self,
        tenant_id: TenantId,
        key_id: str,
        expires_at: dt.datetime | None,
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> ApiKey:
        """Let a key in force end at ``expires_at``, or never. Errors as :meth:`issue` and :meth:`revoke`."""
        _require_ahead(expires_at)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await _read(tx, tenant_id, key_id)
            after = replace(before, expires_at=expires_at)
            await _update(tx, before, after, "api-key.expiry-changed", actor, request_id)
        return after

    async def rotate(
        self,
        tenant_id: TenantId,
        key_id: str,
        *,
        overlap: dt.timedelta = OVERLAP,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> IssuedApiKey:
        """Replace a key by one of the same name and scopes; the old one holds for ``overlap`` more, or shorter.

        The new key is given as long a life as the old one was, whatever earlier rotations have left of that. Of two
        rotations of a key at once each makes a key.

        Raises:
            ConflictError: the tenant was deleted.
            InvalidRequestError: the overlap is negative or longer than :data:`OVERLAP_MAX`.
            NotFoundError: the tenant has no such key in force.
        """
        if not dt.timedelta(0) <= overlap <= OVERLAP_MAX:
            raise InvalidRequestError(f"an overlap has 0 to {OVERLAP_MAX.days} days")
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            old = await _read(tx, tenant_id, key_id)
            now = dt.datetime.now(dt.UTC)
            was_to_end = await _end_but_for_rotations(tx, old)
            life_ends = None if was_to_end is None else now + (was_to_end - old.created_at)
            issued = await _issue(tx, tenant_id, old.scopes, old.name, life_ends, actor, request_id)
            ends = now + overlap if old.expires_at is None else min(now + overlap, old.expires_at)
            await _update(tx, old, replace(old, expires_at=ends), "api-key.rotated", actor, request_id)
        return issued

    async def revoke(
        self, tenant_id: TenantId, key_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> None:
        """End a key; the next request that carries it is refused.

        Raises:
            NotFoundError: the tenant has no such key in force.
        """
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.hold(tx, tenant_id)
            before = await _read(tx, tenant_id, key_id)
            after = replace(before, revoked_at=dt.datetime.now(dt.UTC))
            await _update(tx, before, after, "api-key.revoked", actor, request_id)

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
        try:
            async with self._door(key_hash), self._pool.tenant(tenant_id) as tx:
                row = await tx.fetchrow(queries.FIND_API_KEY, tenant_id, key_hash)
        except NotFoundError:
            row = None  # of an erased tenant no key is in force
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

    async def holds(self, principal: Principal, scope: Scope) -> bool:
        """Whether :meth:`authenticate` would still take the key that ``principal`` came with, and it has ``scope``.

        Raises:
            UnavailableError: the database cannot say.
        """
        try:
            async with self._pool.tenant(principal.tenant_id) as tx:
                found = await tx.fetchval(queries.API_KEY_HOLDS, principal.tenant_id, principal.key_id, scope)
        except NotFoundError:
            return False  # of an erased tenant no key is in force
        return found is not None

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


async def _issue(
    tx: Transaction,
    tenant_id: TenantId,
    scopes: frozenset[Scope],
    name: str,
    expires_at: dt.datetime | None,
    actor: str,
    request_id: str | None,
) -> IssuedApiKey:
    key = f"sk_{tenant_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    key_id = uuid7(time.time_ns() // 1_000_000)
    await tx.execute(queries.INSERT_API_KEY, tenant_id, key_id, _hash(key), name, sorted(scopes), expires_at)
    await tenant_store.record_owned(
        tx, tenant_id, "api-key.issued", f"api-key/{key_id}",
        after={"name": name, "scopes": sorted(scopes), "expires_at": expires_at}, actor=actor, request_id=request_id,
    )  # fmt: skip
    return IssuedApiKey(key_id, tenant_id, scopes, key, expires_at)


async def _read(tx: Transaction, tenant_id: TenantId, key_id: str) -> ApiKey:
    row = await tx.fetchrow(queries.READ_API_KEY, tenant_id, _key_id(key_id))
    key = None if row is None else _stored(tenant_id, row)
    if key is None or not key.in_force(dt.datetime.now(dt.UTC)):
        raise NotFoundError(f"tenant {tenant_id} has no key {key_id} in force")
    return key


async def _end_but_for_rotations(tx: Transaction, key: ApiKey) -> dt.datetime | None:
    """The end that a key in force was given last, which rotations since then may have brought forward.

    They are followed back from end to end: entries have the times of clocks, which need not be in the order of changes.
    None of them is gone: they are as young as an overlap is long, and an audit log is kept for longer.
    """
    ends = key.expires_at
    if ends is None:
        return None
    since = ends - OVERLAP_MAX - dt.timedelta(days=1)  # a day for clocks, and for waiting for the tenant's lock
    rows = await tx.fetch(queries.ROTATIONS_OF_API_KEY, key.tenant_id, f"api-key/{key.id}", since)
    rotations: dict[dt.datetime, dt.datetime | None] = {row["expires_after"]: row["expires_before"] for row in rows}
    while ends is not None and ends in rotations:  # it ends itself: each was to a sooner end
        ends = rotations[ends]
    return ends


async def _update(
    tx: Transaction, before: ApiKey, after: ApiKey, action: str, actor: str, request_id: str | None
) -> None:
    if after == before:
        return
    await tx.execute(
        queries.UPDATE_API_KEY, after.tenant_id, after.id, sorted(after.scopes), after.expires_at, after.revoked_at
    )
    await tenant_store.record_owned(
        tx, after.tenant_id, action, f"api-key/{after.id}", before=_audited(before), after=_audited(after),
        actor=actor, request_id=request_id,
    )  # fmt: skip


def _audited(key: ApiKey) -> audit.Audited:
    return {
        "name": key.name,
        "scopes": sorted(key.scopes),
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _stored(tenant_id: TenantId, row: asyncpg.Record) -> ApiKey:
    return ApiKey(
        str(row["id"]), tenant_id, row["name"], frozenset(Scope(scope) for scope in row["scopes"]),
        row["created_at"], row["expires_at"], row["revoked_at"],
    )  # fmt: skip


def _scopes(scopes: Iterable[Scope | str]) -> frozenset[Scope]:
    try:
        return frozenset(Scope(scope) for scope in scopes)
    except ValueError as error:
        raise InvalidRequestError(f"{error}; there are {', '.join(Scope)}") from error


def _require_ahead(expires_at: dt.datetime | None) -> None:
    if expires_at is None:
        return
    if expires_at.tzinfo is None:
        raise InvalidRequestError("the end of a key needs a time zone")
    if expires_at <= dt.datetime.now(dt.UTC):
        raise InvalidRequestError(f"a key cannot end at {expires_at}, which is past")


def _key_id(text: str) -> str:
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(f"a key's id is a UUID, which {text!r} is not") from error
