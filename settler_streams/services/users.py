"""Users of a tenant: added or invited, given a role, disabled, removed; at least one active owner is left.

All changes of one tenant's users happen one after another, under the tenant's lock: two owners who disable each other
at once do not both succeed.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import asyncpg

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId, canonical_tenant, uuid7
from settler_streams.services import audit, queries, tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.passwords import hash_password
from settler_streams.services.refusals import taken

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

INVITATION_SECRET_BYTES = 32
INVITED_FOR = dt.timedelta(days=7)
"""How long an invitation can be accepted: over a weekend, not over a holiday."""
EMAIL_CHARS_MAX = 254
"""RFC 5321, as corrected by erratum 1690."""
USERS_MAX = 1_000
"""Of one answer; the next one starts behind its last."""

_EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]+")
_INVITATION = re.compile(r"inv_([0-9a-f-]{36})_([0-9a-f-]{36})_[A-Za-z0-9_-]{43}")


class Role(enum.StrEnum):
    """What a user is to the tenant."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    VIEWER = "viewer"


class UserStatus(enum.StrEnum):
    """Only the active can be counted on: the invited have no password, the disabled may not use theirs."""

    INVITED = "invited"
    ACTIVE = "active"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class User:
    """A user as stored, without the password's hash."""

    id: str
    tenant_id: TenantId
    email: str
    role: Role
    status: UserStatus


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invited user, and the token to accept with. ``token`` exists only here: inviting again makes another."""

    user: User
    expires_at: dt.datetime
    token: str = field(repr=False)


class InvitationError(InvalidRequestError):
    """The invitation is malformed, unknown, used or expired; which of them is not said."""

    def __init__(self) -> None:
        super().__init__("the invitation is not valid; ask for another one")


class UserService:
    """Keeps the users of tenants."""

    def __init__(self, pool: TenantConnectionPool) -> None:
        self._pool = pool

    async def list(self, tenant_id: TenantId, *, after: str | None = None, limit: int = 100) -> list[User]:
        """The tenant's users by id, that is, in the order in which they came.

        Raises:
            InvalidRequestError: ``limit`` is not between 1 and :data:`USERS_MAX`, or ``after`` is no id.
            NotFoundError: there is no such tenant.
        """
        if not 1 <= limit <= USERS_MAX:
            raise InvalidRequestError(f"an answer has 1 to {USERS_MAX} users")
        behind = None if after is None else _user_id(after)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.read(tx, tenant_id)
            rows = await tx.fetch(queries.USERS_AFTER, tenant_id, behind, limit)
        return [_user(tenant_id, row) for row in rows]

    async def add(
        self,
        tenant_id: TenantId,
        email: str,
        role: Role,
        password: str,
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> User:
        """Add a user who is active at once.

        Raises:
            ConflictError: the tenant has a user of this address already, or was deleted.
            InvalidRequestError: the address is none, or the password too short or too long.
            NotFoundError: there is no such tenant.
        """
        user = User(_new_id(), tenant_id, _address(email), role, UserStatus.ACTIVE)
        password_hash = await hash_password(password)
        with _unique(user.email):
            async with self._pool.tenant(tenant_id) as tx:
                await tenant_store.lock(tx, tenant_id)
                await _insert(tx, user, password_hash=password_hash)
                await _record(tx, "user.added", None, user, actor, request_id)
        return user

    async def invite(
        self,
        tenant_id: TenantId,
        email: str,
        role: Role,
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> Invitation:
        """Invite a user, who sets a password with :meth:`accept` within :data:`INVITED_FOR`.

        Whoever is invited already gets a new token (and this role); the one before is worth nothing then.

        Raises:
            ConflictError: the tenant has an active or disabled user of this address, or was deleted.
            InvalidRequestError: the address is none.
            NotFoundError: there is no such tenant.
        """
        user = User(_new_id(), tenant_id, _address(email), role, UserStatus.INVITED)
        expires_at = dt.datetime.now(dt.UTC) + INVITED_FOR
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            row = await tx.fetchrow(queries.FIND_USER_BY_EMAIL, tenant_id, user.email)
            before = None if row is None else _user(tenant_id, row)
            if before is not None:
                if before.status is not UserStatus.INVITED:
                    raise ConflictError(f"the tenant has a user {user.email}, who is {before.status}")
                user = replace(before, role=role)
            token = f"inv_{tenant_id}_{user.id}_{secrets.token_urlsafe(INVITATION_SECRET_BYTES)}"
            if before is None:
                await _insert(tx, user, invitation_hash=_hash(token), expires_at=expires_at)
            else:
                await tx.execute(
                    queries.INVITE_AGAIN, tenant_id, user.id, role.value, _hash(token), expires_at
                )  # fmt: skip
            await _record(tx, "user.invited", before, user, actor, request_id)
        return Invitation(user, expires_at, token)

    async def accept(self, token: str, password: str, *, request_id: str | None = None) -> User:
        """Accept an invitation, once: from now on the user is active, with this password.

        Raises:
            ConflictError: the tenant was deleted.
            InvalidRequestError: the password is too short or too long.
            InvitationError: it is not a valid invitation.
        """
        match = _INVITATION.fullmatch(token)
        if match is None:
            raise InvitationError
        try:
            tenant_id, user_id = canonical_tenant(match[1]), canonical_tenant(match[2])
        except ValueError as error:
            raise InvitationError from error
        async with self._pool.tenant(tenant_id) as tx:
            if not await tx.fetchval(queries.INVITATION_HOLDS, tenant_id, user_id, _hash(token)):
                raise InvitationError  # before a hash is computed, which takes long by design
        password_hash = await hash_password(password)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            row = await tx.fetchrow(queries.ACCEPT_INVITATION, tenant_id, user_id, _hash(token), password_hash)
            if row is None:
                raise InvitationError
            after = _user(tenant_id, row)
            before = replace(after, status=UserStatus.INVITED)
            await _record(tx, "user.accepted", before, after, f"user:{user_id}", request_id)
        return after

    async def change_role(
        self,
        tenant_id: TenantId,
        user_id: str,
        role: Role,
        *,
        actor: str = PLATFORM_ACTOR,
        request_id: str | None = None,
    ) -> User:
        """Give a user another role.

        Raises:
            ConflictError: it is the last active owner, or the tenant was deleted.
            NotFoundError: there is no such tenant or user.
        """
        return await self._change(
            tenant_id, user_id, "user.role-changed", lambda u: replace(u, role=role), actor, request_id
        )

    async def disable(
        self, tenant_id: TenantId, user_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> User:
        """Keep a user out until :meth:`enable`. Errors as :meth:`change_role`, also for one who is only invited."""
        return await self._change(
            tenant_id, user_id, "user.disabled", lambda u: _with_status(u, UserStatus.DISABLED), actor, request_id
        )

    async def enable(
        self, tenant_id: TenantId, user_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> User:
        """Undo :meth:`disable`. Errors as there."""
        return await self._change(
            tenant_id, user_id, "user.enabled", lambda u: _with_status(u, UserStatus.ACTIVE), actor, request_id
        )

    async def remove(
        self, tenant_id: TenantId, user_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> None:
        """Remove a user, or take an invitation back; the audit log remembers. Errors as :meth:`change_role`."""
        await self._change(tenant_id, user_id, "user.removed", lambda _: None, actor, request_id)

    async def _change(
        self,
        tenant_id: TenantId,
        user_id: str,
        action: str,
        change: Callable[[User], User | None],
        actor: str,
        request_id: str | None,
    ) -> User:
        """1. Lock the tenant; 2. change the user; 3. undo it if no active owner is left; 4. audit; 5. commit."""
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.lock(tx, tenant_id)
            row = await tx.fetchrow(queries.READ_USER, tenant_id, _user_id(user_id))
            if row is None:
                raise NotFoundError(f"tenant {tenant_id} has no user {user_id}")
            before = _user(tenant_id, row)
            after = change(before)
            if after == before:
                return before
            if after is None:
                await tx.execute(queries.DELETE_USER, tenant_id, before.id)
            else:
                await tx.execute(queries.UPDATE_USER, tenant_id, before.id, after.role.value, after.status.value)
            if _owns(before) and not (after and _owns(after)) and not await tx.fetchval(queries.HAS_OWNER, tenant_id):
                raise ConflictError(f"{before.email} is the last active owner of tenant {tenant_id}")
            await _record(tx, action, before, after, actor, request_id)
        return after or before


def _owns(user: User) -> bool:
    return user.role is Role.OWNER and user.status is UserStatus.ACTIVE


def _with_status(user: User, status: UserStatus) -> User:
    if user.status is UserStatus.INVITED:
        raise ConflictError(f"{user.email} is only invited; remove the invitation, or wait until it is accepted")
    return replace(user, status=status)


async def _insert(
    tx: Transaction,
    user: User,
    *,
    password_hash: str | None = None,
    invitation_hash: bytes | None = None,
    expires_at: dt.datetime | None = None,
) -> None:
    await tx.execute(
        queries.INSERT_USER,
        user.tenant_id,
        user.id,
        user.email,
        user.role.value,
        user.status.value,
        password_hash,
        invitation_hash,
        expires_at,
    )


async def _record(
    tx: Transaction, action: str, before: User | None, after: User | None, actor: str, request_id: str | None
) -> None:
    subject = after or before
    if subject is None:
        raise ValueError("a change is of a user who was there before or is there afterwards")
    await tenant_store.record_owned(
        tx, subject.tenant_id, action, f"user/{subject.id}",
        before=_audited(before) if before else None, after=_audited(after) if after else None,
        actor=actor, request_id=request_id,
    )  # fmt: skip


def _audited(user: User) -> audit.Audited:
    document = asdict(user)
    del document["tenant_id"], document["id"]
    return document


def _user(tenant_id: TenantId, row: asyncpg.Record) -> User:
    return User(str(row["id"]), tenant_id, row["email"], Role(row["role"]), UserStatus(row["status"]))


def _address(email: str) -> str:
    """The address as it is stored. Whether it reaches anybody only a message can tell."""
    address = email.strip().lower()
    if len(address) > EMAIL_CHARS_MAX or not _EMAIL.fullmatch(address):
        raise InvalidRequestError(f"{email!r} is not an e-mail address")
    return address


def _user_id(text: str) -> str:
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(f"a user's id is a UUID, which {text!r} is not") from error


def _unique(email: str) -> AbstractContextManager[None]:
    return taken(f"the tenant has a user {email} already")


def _new_id() -> str:
    return uuid7(time.time_ns() // 1_000_000)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
