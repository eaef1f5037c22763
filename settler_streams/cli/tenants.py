"""``settler tenants``: make tenants, look at them, move them between tiers, and give them API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from settler_streams.cli.exports import export, verify_export
from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.retention import retention, sweep
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_schemas import schema
from settler_streams.cli.webhooks import webhooks
from settler_streams.errors import InvalidRequestError
from settler_streams.events import TenantTier
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.services import Scope, Tenant, TenantService, hash_password

T = TypeVar("T")

_TIER = click.Choice([tier.value for tier in TenantTier])


@click.group()
def tenants() -> None:
    """Make, show and change tenants."""


@tenants.command()
@flag("--name", env="SETTLER_TENANT_NAME", required=True, help="Name for people.")
@flag("--slug", env="SETTLER_TENANT_SLUG", required=True, help="Unique short name, such as acme-corp.")
@flag("--tier", env="SETTLER_TENANT_TIER", type=_TIER, default="starter", help="Decides limits and weight.")
@flag("--owner-email", env="SETTLER_OWNER_EMAIL", required=True, help="The owner's address.")
@flag("--owner-password", env="SETTLER_OWNER_PASSWORD", prompt=True, hide_input=True, help="Stored hashed.")
@flag("--parent", env="SETTLER_TENANT_PARENT", default=None, help="Id of the parent tenant.")
@state_dir_flag()
@json_flag()
def create(
    name: str,
    slug: str,
    tier: str,
    owner_email: str,
    owner_password: str,
    parent: str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Create a tenant and its owner; prints its id once admission knows it."""

    async def work(service: TenantService) -> Tenant:
        created = await service.create_tenant(
            name=name,
            slug=slug,
            owner_email=owner_email,
            owner_password_hash=await hash_password(owner_password),
            tier=TenantTier(tier),
            parent_id=None if parent is None else _tenant_id(parent),
            actor="cli",
        )
        return created.tenant

    tenant = _with_service(state_dir, work)
    if as_json:
        print_json(_document(tenant))
    else:
        click.echo(tenant.id)  # alone, so that a shell can keep it


@tenants.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def show(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Show one tenant; ``quotas`` are its own limits, which override its tier's."""
    _print(_with_service(state_dir, lambda service: service.get(_tenant_id(tenant))), as_json=as_json)


@tenants.command()
@click.argument("tenant")
@click.argument("tier", type=_TIER)
@state_dir_flag()
@json_flag()
def tier(tenant: str, tier: str, state_dir: Path, as_json: bool) -> None:
    """Move a tenant to another tier; its waiting jobs are weighed anew at once."""
    changed = _with_service(
        state_dir, lambda service: service.change_tier(_tenant_id(tenant), TenantTier(tier), actor="cli")
    )
    _print(changed, as_json=as_json)


@tenants.command()
@click.argument("tenant")
@flag(
    "--scope",
    "scopes",
    env="SETTLER_KEY_SCOPES",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    default=[scope.value for scope in Scope],
    help="What the key may do; may be given several times.",
)
@state_dir_flag()
@json_flag()
def key(tenant: str, scopes: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Issue an API key. It is shown this once."""
    issued = _with_service(state_dir, lambda service: service.issue_api_key(_tenant_id(tenant), scopes))
    if as_json:
        print_json({"key": issued.key})
    else:
        click.echo(issued.key)


tenants.add_command(retention)
tenants.add_command(sweep)
tenants.add_command(schema)
tenants.add_command(export)
tenants.add_command(verify_export)
tenants.add_command(webhooks)


def _with_service(state_dir: Path, work: Callable[[TenantService], Awaitable[T]]) -> T:
    async def run() -> T:
        async with TenantService.connect(settings_of(state_dir)) as service:
            return await work(service)

    return asyncio.run(run())


def _tenant_id(text: str) -> TenantId:
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


def _print(tenant: Tenant, *, as_json: bool) -> None:
    if as_json:
        print_json(_document(tenant))
    else:
        print_table(("", ""), _document(tenant).items())


def _document(tenant: Tenant) -> dict[str, Any]:
    return {
        "id": tenant.id,
        "slug": tenant.slug,
        "name": tenant.name,
        "tier": tenant.tier,
        "status": tenant.status,
        "parent_id": tenant.parent_id,
        "root_id": tenant.root_id,
        "version": tenant.version,
        "quotas": dict(tenant.quotas),
    }
