"""``settler tenants rename``, ``suspend``, ``delete`` and their like: a tenant changed, ended and brought back."""

from __future__ import annotations

import asyncio
import datetime as dt
from pathlib import Path

import click

from settler_streams.cli.output import flag, json_flag, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import (
    ACTOR,
    TENANT_COLUMNS,
    directory_of,
    page_flags,
    print_many,
    print_tenant,
    tenant_document,
    tenant_id_of,
    with_service,
)
from settler_streams.services import Tenant, TenantService


@click.command()
@click.argument("tenant")
@click.argument("name")
@state_dir_flag()
@json_flag()
def rename(tenant: str, name: str, state_dir: Path, as_json: bool) -> None:
    """Give a tenant another name for people; its slug stays."""
    renamed = with_service(state_dir, lambda service: service.rename(tenant_id_of(tenant), name, actor=ACTOR))
    print_tenant(renamed, as_json=as_json)


@click.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def suspend(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Have every further request of a tenant and its children refused; what runs, ends."""
    changed = with_service(state_dir, lambda service: service.suspend(tenant_id_of(tenant), actor=ACTOR))
    print_tenant(changed, as_json=as_json)


@click.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def reactivate(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Undo a suspension."""
    changed = with_service(state_dir, lambda service: service.reactivate(tenant_id_of(tenant), actor=ACTOR))
    print_tenant(changed, as_json=as_json)


@click.command()
@click.argument("tenant")
@page_flags
@state_dir_flag()
@json_flag()
def children(tenant: str, after: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """List the tenants directly under one, the deleted among them."""
    behind = None if after is None else tenant_id_of(after)
    found = with_service(
        state_dir, lambda service: service.children(tenant_id_of(tenant), after=behind, limit=limit, actor=ACTOR)
    )
    print_many(TENANT_COLUMNS, [tenant_document(child) for child in found], as_json=as_json)


@click.command()
@click.argument("tenant")
@flag(
    "--grace-days",
    env="SETTLER_GRACE_DAYS",
    type=click.IntRange(0, 3650),
    default=None,
    help="Days for which it can be restored, instead of TENANT_DELETE_GRACE_DAYS.",
)
@state_dir_flag()
@json_flag()
def delete(tenant: str, grace_days: int | None, state_dir: Path, as_json: bool) -> None:
    """Refuse a tenant at once, and let it be erased once its grace period is over. Its children go first."""
    grace = None if grace_days is None else dt.timedelta(days=grace_days)
    deleted = with_service(state_dir, lambda service: service.delete(tenant_id_of(tenant), grace=grace, actor=ACTOR))
    print_tenant(deleted, as_json=as_json)


@click.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def restore(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Undo a deletion within its grace period; the tenant is as it was."""
    restored = with_service(state_dir, lambda service: service.restore(tenant_id_of(tenant), actor=ACTOR))
    print_tenant(restored, as_json=as_json)


@click.command()
@state_dir_flag()
@json_flag()
def erasable(state_dir: Path, as_json: bool) -> None:
    """List the deleted tenants whose grace period is over, children first; `erase --due` erases them.

    A parent is among them once all under it are, or are erased.
    """

    async def work() -> list[Tenant]:
        settings = settings_of(state_dir)
        async with TenantService.connect(settings) as service, directory_of(settings) as directory:
            return await service.erasable(directory)

    found = asyncio.run(work())
    print_many(TENANT_COLUMNS, [tenant_document(tenant) for tenant in found], as_json=as_json)


COMMANDS = (rename, suspend, reactivate, children, delete, restore, erasable)
