"""Custom domains: added, proven by a TXT record, counted by admission as long as they are verified.

Each verification and each removal of a verified domain happens once, under the tenant's lock, and leaves one usage
event (plus or minus one) in the outbox of the same transaction. The relay may publish it again; admission knows its id
for ten minutes.
"""

from __future__ import annotations

import datetime as dt
import enum
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import asyncpg

from settler_streams.adapters.postgres import outbox
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_context import TenantContext
from settler_streams.errors import Disposition, InvalidRequestError, NotFoundError, SettlerError
from settler_streams.events import QuotaType, Resource, UsageRecorded, encode, envelope
from settler_streams.ids import TenantId, canonical_tenant, uuid7
from settler_streams.services import audit, queries, tenant_store
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.quotas import QuotaExceededError, QuotaLevel, QuotaService
from settler_streams.services.refusals import taken
from settler_streams.services.tenant_store import SOURCE, Tenant

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

TOKEN_BYTES = 24
RECORD_LABEL = "_settler-challenge"
RECORD_PREFIX = "settler-verification="
DOMAIN_CHARS_MAX = 253 - len(RECORD_LABEL) - 1
"""RFC 1035 allows 253 for a name, and the record's has to fit."""
DOMAINS_MAX = 1_000
"""Of one answer; the next one starts behind its last."""

_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])")


class TxtRecords(Protocol):
    """What verification asks of the DNS."""

    async def of(self, name: str) -> Sequence[str]:
        """The texts of the TXT records at ``name``; :class:`UnavailableError` when that cannot be told."""


class DomainStatus(enum.StrEnum):
    """Only what is verified counts as the tenant's."""

    PENDING = "pending"
    VERIFIED = "verified"


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as stored. ``record_name`` and ``record_value`` are the TXT record that proves it."""

    id: str
    tenant_id: TenantId
    domain: str
    status: DomainStatus
    token: str
    verified_at: dt.datetime | None = None

    @property
    def record_name(self) -> str:
        """Where the record has to be."""
        return f"{RECORD_LABEL}.{self.domain}"

    @property
    def record_value(self) -> str:
        """What it has to say."""
        return RECORD_PREFIX + self.token


class DomainNotProvenError(SettlerError):
    """The TXT record is not there, or says something else; set it, and wait until the DNS has it everywhere."""

    disposition = Disposition.REFUSE

    def __init__(self, domain: Domain, found: int) -> None:
        super().__init__(
            f"of {found} TXT records at {domain.record_name} none is {domain.record_value!r}; set it and try again"
        )
        self.domain = domain


class DomainService:
    """Keeps the domains of tenants. ``relay``, where this process has one, spares the usage event its interval."""

    def __init__(
        self,
        pool: TenantConnectionPool,
        records: TxtRecords,
        relay: OutboxRelay | None = None,
        *,
        quotas: QuotaService | None = None,
    ) -> None:
        self._pool = pool
        self._records = records
        self._relay = relay
        self._quotas = quotas or QuotaService(pool)

    async def list(self, tenant_id: TenantId, *, after: str | None = None, limit: int = 100) -> list[Domain]:
        """The tenant's domains in the order in which they were added.

        Raises:
            InvalidRequestError: ``limit`` is not between 1 and :data:`DOMAINS_MAX`, or ``after`` is no id.
            NotFoundError: there is no such tenant.
        """
        if not 1 <= limit <= DOMAINS_MAX:
            raise InvalidRequestError(f"an answer has 1 to {DOMAINS_MAX} domains")
        behind = None if after is None else _domain_id(after)
        async with self._pool.tenant(tenant_id) as tx:
            await tenant_store.read(tx, tenant_id)
            rows = await tx.fetch(queries.DOMAINS_AFTER, tenant_id, behind, limit)
        return [_domain(tenant_id, row) for row in rows]

    async def add(
        self, tenant_id: TenantId, domain: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Domain:
        """Add a domain, which is pending until :meth:`verify` has found its record.

        The tenant's own quota is checked exactly, pending domains included. Of its parents, what counts is what their
        usage reports say: verified domains, about two seconds late; :meth:`verify` asks them again. An Enterprise
        tenant has no limit.

        Raises:
            ConflictError: the tenant has the domain already, or was deleted.
            InvalidRequestError: it is not a domain name.
            NotFoundError: there is no such tenant.
            QuotaExceededError: the tenant or a parent has no room for another one.
        """
        added = Domain(
            uuid7(_now_ms()), tenant_id, _name(domain), DomainStatus.PENDING, secrets.token_urlsafe(TOKEN_BYTES)
        )
        with taken(f"the tenant has {added.domain} already", of="domain"):
            async with self._pool.tenant(tenant_id) as tx:
                tenant = await tenant_store.lock(tx, tenant_id)
                await tx.execute(queries.INSERT_DOMAIN, tenant_id, added.id, added.domain, added.token)
                await self._require_room(tx, tenant)
                await _record(tx, "domain.added", None, added, actor, request_id)
        return added

    async def verify(
        self, tenant_id: TenantId, domain_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> Domain:
        """Ask the DNS for the domain's record; a domain that is verified stays so, and is not asked for again.

        Each parent has to have room for one more. Its usage reports say so, which lag by about two seconds: what is
        verified within them can go beyond its limit.

        Raises:
            ConflictError: the tenant was deleted.
            DomainNotProvenError: the record is not there.
            NotFoundError: the tenant has no such domain.
            QuotaExceededError: a parent has no room for another one; the domain stays pending.
            UnavailableError: the DNS or Postgres did not answer.
        """
        async with self._pool.tenant(tenant_id) as tx:
            asked = await _read(tx, tenant_id, domain_id)
        if asked.status is DomainStatus.VERIFIED:
            return asked
        found = await self._records.of(asked.record_name)
        if not any(secrets.compare_digest(text.strip().encode(), asked.record_value.encode()) for text in found):
            raise DomainNotProvenError(asked, len(found))
        async with self._pool.tenant(tenant_id) as tx:
            tenant = await tenant_store.lock(tx, tenant_id)
            before = await _read(tx, tenant_id, domain_id)
            if before.status is DomainStatus.VERIFIED:
                return before
            now = dt.datetime.now(dt.UTC)
            after = replace(before, status=DomainStatus.VERIFIED, verified_at=now)
            own = await self._quotas.level(tx, tenant_id, QuotaType.CUSTOM_DOMAINS)
            await self._require_room_above(tx, tenant, own)  # where a domain counts only from now on
            await tx.execute(queries.VERIFY_DOMAIN, tenant_id, after.id, now)
            await _count(tx, tenant, 1)
            await _record(tx, "domain.verified", before, after, actor, request_id)
        self._nudge()
        return after

    async def remove(
        self, tenant_id: TenantId, domain_id: str, *, actor: str = PLATFORM_ACTOR, request_id: str | None = None
    ) -> None:
        """Remove a domain; if it was verified, it counts no longer.

        Raises:
            ConflictError: the tenant was deleted.
            NotFoundError: the tenant has no such domain.
        """
        async with self._pool.tenant(tenant_id) as tx:
            tenant = await tenant_store.lock(tx, tenant_id)
            before = await _read(tx, tenant_id, domain_id)
            await tx.execute(queries.DELETE_DOMAIN, tenant_id, before.id)
            if before.status is DomainStatus.VERIFIED:
                await _count(tx, tenant, -1)
            await _record(tx, "domain.removed", before, None, actor, request_id)
        self._nudge()

    async def _require_room(self, tx: Transaction, tenant: Tenant) -> None:
        """The domain is inserted already: what is there may be as much as the limit."""
        own = await self._quotas.level(tx, tenant.id, QuotaType.CUSTOM_DOMAINS)
        there = await tx.fetchval(queries.COUNT_DOMAINS, tenant.id)
        if not own.enterprise and there > own.limit:
            raise QuotaExceededError(QuotaType.CUSTOM_DOMAINS, there - 1, own.limit)
        await self._require_room_above(tx, tenant, own)

    async def _require_room_above(self, tx: Transaction, tenant: Tenant, own: QuotaLevel) -> None:
        """Every parent has room for one more, as of its last usage report. An Enterprise tenant needs none there."""
        parent_id = None if own.enterprise else own.parent_id
        while parent_id is not None:
            level = await self._quotas.level(tx, parent_id, QuotaType.CUSTOM_DOMAINS)
            if level.used + 1 > level.limit:
                raise QuotaExceededError(QuotaType.CUSTOM_DOMAINS, level.used, level.limit)
            parent_id = level.parent_id
        await TenantContext.set(tx, tenant.id)

    def _nudge(self) -> None:
        if self._relay is not None:
            self._relay.nudge()


async def _count(tx: Transaction, tenant: Tenant, quantity: int) -> None:
    """Have admission count so many verified domains more."""
    used = UsageRecorded(resource=Resource.CUSTOM_DOMAINS, quantity=quantity)
    event = envelope(used, event_id=uuid7(_now_ms()), source=SOURCE, tenant=tenant.id, time=dt.datetime.now(dt.UTC))
    await outbox.append(tx, tenant.id, "usage-events", tenant.root_id, encode(event))


async def _read(tx: Transaction, tenant_id: TenantId, domain_id: str) -> Domain:
    row = await tx.fetchrow(queries.READ_DOMAIN, tenant_id, _domain_id(domain_id))
    if row is None:
        raise NotFoundError(f"tenant {tenant_id} has no domain {domain_id}")
    return _domain(tenant_id, row)


async def _record(
    tx: Transaction, action: str, before: Domain | None, after: Domain | None, actor: str, request_id: str | None
) -> None:
    subject = after or before
    if subject is None:
        raise ValueError("a change is of a domain that was there before or is there afterwards")
    await tenant_store.record_owned(
        tx, subject.tenant_id, action, f"domain/{subject.id}",
        before=_audited(before) if before else None, after=_audited(after) if after else None,
        actor=actor, request_id=request_id,
    )  # fmt: skip


def _audited(domain: Domain) -> audit.Audited:
    return {"domain": domain.domain, "status": domain.status, "verified_at": domain.verified_at}


def _domain(tenant_id: TenantId, row: asyncpg.Record) -> Domain:
    return Domain(
        str(row["id"]), tenant_id, row["domain"], DomainStatus(row["status"]), row["verification_token"],
        row["verified_at"],
    )  # fmt: skip


def _name(text: str) -> str:
    name = text.strip().lower().removesuffix(".")
    if len(name) > DOMAIN_CHARS_MAX or not _DOMAIN.fullmatch(name):
        raise InvalidRequestError(
            f"{text!r} is not a domain name such as app.acme.example, of {DOMAIN_CHARS_MAX} characters at most; "
            "letters beyond ASCII are written in their xn-- form"
        )
    return name


def _domain_id(text: str) -> str:
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(f"a domain's id is a UUID, which {text!r} is not") from error


def _now_ms() -> int:
    return int(dt.datetime.now(dt.UTC).timestamp() * 1000)
