"""``settler tenants``: make tenants, look at them, move them between tiers; what else a tenant has, by its group."""

from __future__ import annotations

from pathlib import Path

import click

from settler_streams.cli import tenant_life
from settler_streams.cli.erasure import erase
from settler_streams.cli.exports import export, restore_backup, verify_export
from settler_streams.cli.output import flag, json_flag, print_json, state_dir_flag
from settler_streams.cli.retention import retention, sweep
from settler_streams.cli.tenant_calls import (
    ACTOR,
    print_tenant,
    tenant_document,
    tenant_id_of,
    with_relay,
    with_service,
)
from settler_streams.cli.tenant_config import config, onboarding
from settler_streams.cli.tenant_domains import domains
from settler_streams.cli.tenant_keys import keys
from settler_streams.cli.tenant_list import list_
from settler_streams.cli.tenant_quotas import QuotaLimit, limits_of, quotas
from settler_streams.cli.tenant_schemas import schema
from settler_streams.cli.tenant_users import users
from settler_streams.cli.webhooks import webhooks
from settler_streams.events import QuotaType, TenantTier
from settler_streams.services import ApiKeys, Scope, Tenant, TenantService, hash_password

_TIER = click.Choice([tier.value for tier in TenantTier])


@click.group()
def tenants() -> None:
    """Make, show and change tenants."""


@tenants.command()
@flag("--name", env="SETTLER_TENANT_NAME", required=True, help="Name for people.")
@flag("--slug", env="SETTLER_TENANT_SLUG", required=True, help="Unique short name, such as acme-corp.")
@flag("--tier", env="SETTLER_TENANT_TIER", type=_TIER, default="starter", help="Decides limits and weight.")
@flag(
    "--quota",
    "given",
    env="SETTLER_TENANT_QUOTAS",
    type=QuotaLimit(),
    multiple=True,
    help="A limit of its own instead of its tier's, such as storage=1000000; may be given several times.",
)
@flag("--owner-email", env="SETTLER_OWNER_EMAIL", required=True, help="The owner's address.")
@flag("--owner-password", env="SETTLER_OWNER_PASSWORD", prompt=True, hide_input=True, help="Stored hashed.")
@flag("--parent", env="SETTLER_TENANT_PARENT", default=None, help="Id of the parent tenant.")
@state_dir_flag()
@json_flag()
def create(
    name: str,
    slug: str,
    tier: str,
    given: tuple[tuple[QuotaType, int], ...],
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
            parent_id=None if parent is None else tenant_id_of(parent),
            quotas=limits_of(given),
            actor=ACTOR,
        )
        return created.tenant

    tenant = with_service(state_dir, work)
    if as_json:
        print_json(tenant_document(tenant))
    else:
        click.echo(tenant.id)  # alone, so that a shell can keep it


@tenants.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def show(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Show one tenant; ``quotas`` are its own limits, which override its tier's."""
    print_tenant(with_service(state_dir, lambda service: service.get(tenant_id_of(tenant))), as_json=as_json)


@tenants.command()
@click.argument("tenant")
@click.argument("tier", type=_TIER)
@state_dir_flag()
@json_flag()
def tier(tenant: str, tier: str, state_dir: Path, as_json: bool) -> None:
    """Move a tenant to another tier; its waiting jobs are weighed anew at once."""
    changed = with_service(
        state_dir, lambda service: service.change_tier(tenant_id_of(tenant), TenantTier(tier), actor=ACTOR)
    )
    print_tenant(changed, as_json=as_json)


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
    """Issue an API key and print it alone. It is shown this once; `keys issue` says more."""
    issued = with_relay(state_dir, lambda pool: ApiKeys(pool).issue(tenant_id_of(tenant), scopes, actor=ACTOR))
    if as_json:
        print_json({"key": issued.key})
    else:
        click.echo(issued.key)


for command in (
    list_, quotas, *tenant_life.COMMANDS, erase, users, keys, domains, webhooks, config, onboarding, retention, sweep,
    schema, export, verify_export, restore_backup,
):  # fmt: skip
    tenants.add_command(command)
