"""What the commands under ``settler tenants`` have in common: their services, their ids, and how they print."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.cli.output import flag, print_json, print_table
from settler_streams.cli.target import settings_of
from settler_streams.errors import InvalidRequestError, SettlerError
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.services import EventPublisher, OutboxRelay, Tenant, TenantDirectory, TenantService
from settler_streams.services.tenant_store import SOURCE
from settler_streams.settings import Settings

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

ACTOR = "cli"
"""Who the audit log says it was."""
TENANT_COLUMNS = ("id", "slug", "name", "tier", "status", "erase_after")
"""What a list for people shows of each tenant."""


def page_flags(command: F) -> F:
    """``--after`` and ``--limit``, for a list."""
    limit = flag(
        "--limit", env="SETTLER_PAGE_LIMIT", type=click.IntRange(1, 1000), default=100, help="At most so many."
    )
    after = flag("--after", env="SETTLER_PAGE_AFTER", default=None, help="Only those behind this id.")
    return after(limit(command))


def with_service(state_dir: Path, work: Callable[[TenantService], Awaitable[T]]) -> T:
    """Run ``work`` with a service whose changes are known to admission when they return."""

    async def run() -> T:
        async with TenantService.connect(settings_of(state_dir)) as service:
            return await work(service)

    return asyncio.run(run())


def with_pool(state_dir: Path, work: Callable[[TenantConnectionPool], Awaitable[T]]) -> T:
    """Run ``work``, which reads, and needs nothing but Postgres."""

    async def run() -> T:
        async with pool_of(settings_of(state_dir)) as pool:
            return await work(pool)

    return asyncio.run(run())


def with_relay(state_dir: Path, work: Callable[[TenantConnectionPool], Awaitable[T]]) -> T:
    """As :func:`with_pool`; then what it left in the outbox goes to Kafka, unless another relay is at it.

    The change is stored by then, so whatever keeps it from Kafka, this only says who will tell it: what ``work``
    returns may be a secret that is shown once.
    """

    async def run() -> T:
        settings = settings_of(state_dir)
        async with pool_of(settings) as pool:
            done = await work(pool)
            await _publish(pool, settings)
        return done

    return asyncio.run(run())


async def _publish(pool: TenantConnectionPool, settings: Settings) -> None:
    try:
        publisher = EventPublisher(settings, source=SOURCE)
        await publisher.start()
        try:
            while await OutboxRelay(pool, publisher).publish_pending():
                pass
        finally:
            await publisher.stop()
    except (SettlerError, asyncio.CancelledError) as error:  # also if somebody does not want to wait for Kafka
        why = str(error) or "interrupted"
        click.echo(f"stored; a gateway, or the next command that reaches Kafka, tells it: {why}", err=True)


@asynccontextmanager
async def pool_of(settings: Settings) -> AsyncIterator[TenantConnectionPool]:
    """A pool that is closed afterwards."""
    pool = await TenantConnectionPool.open(settings)
    try:
        yield pool
    finally:
        await pool.close()


@asynccontextmanager
async def directory_of(settings: Settings) -> AsyncIterator[TenantDirectory]:
    """A directory that has every tenant, and is stopped afterwards."""
    directory = TenantDirectory(settings)
    await directory.start()
    try:
        yield directory
    finally:
        await directory.stop()


def tenant_id_of(text: str) -> TenantId:
    """The id that was typed.

    Raises:
        InvalidRequestError: it is none.
    """
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


def print_one(document: Mapping[str, Any], *, as_json: bool, once: str | None = None) -> None:
    """One thing: its fields below one another.

    The field ``once`` is a secret that is never shown again: for people it is the first line, alone and whole.
    """
    if as_json:
        print_json(document)
        return
    if once is not None:
        click.echo(document[once])  # first, so that nothing about the rest can keep it
    print_table(("", ""), ((name, value) for name, value in document.items() if name != once))


def print_many(columns: Sequence[str], documents: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Several things of one kind, each a line with the given columns; whole as JSON."""
    if as_json:
        print_json(documents)
    else:
        print_table(columns, ([document[column] for column in columns] for document in documents))


def print_tenant(tenant: Tenant, *, as_json: bool) -> None:
    """A tenant, without its configuration."""
    print_one(tenant_document(tenant), as_json=as_json)


def tenant_document(tenant: Tenant) -> dict[str, Any]:
    """What is shown of a tenant."""
    document = asdict(tenant)
    del document["config"], document["restored_as"]
    return document
