"""``settler tenants users``: who works for a tenant."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from settler_streams.cli.output import flag, json_flag, print_json, state_dir_flag
from settler_streams.cli.tenant_calls import (
    ACTOR,
    page_flags,
    print_many,
    print_one,
    tenant_id_of,
    with_pool,
    with_relay,
)
from settler_streams.services import Role, UserService

_ROLE = click.Choice([role.value for role in Role])
_password = flag(
    "--password", env="SETTLER_USER_PASSWORD", prompt=True, hide_input=True, help="8 to 1024 characters; stored hashed."
)


@click.group()
def users() -> None:
    """Add, invite, change and remove a tenant's users. The last active owner stays."""


@users.command("list")
@click.argument("tenant")
@page_flags
@state_dir_flag()
@json_flag()
def list_(tenant: str, after: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """List users in the order in which they came."""
    found = with_pool(state_dir, lambda pool: UserService(pool).list(tenant_id_of(tenant), after=after, limit=limit))
    print_many(("id", "email", "role", "status"), [asdict(user) for user in found], as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("email")
@click.argument("role", type=_ROLE)
@_password
@state_dir_flag()
@json_flag()
def add(tenant: str, email: str, role: str, password: str, state_dir: Path, as_json: bool) -> None:
    """Add a user who is active at once."""
    added = with_relay(
        state_dir, lambda pool: UserService(pool).add(tenant_id_of(tenant), email, Role(role), password, actor=ACTOR)
    )
    print_one(asdict(added), as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("email")
@click.argument("role", type=_ROLE)
@state_dir_flag()
@json_flag()
def invite(tenant: str, email: str, role: str, state_dir: Path, as_json: bool) -> None:
    """Invite a user. The token that is printed is shown this once; with it the user sets a password within a week."""
    invitation = with_relay(
        state_dir, lambda pool: UserService(pool).invite(tenant_id_of(tenant), email, Role(role), actor=ACTOR)
    )
    shown = {**asdict(invitation.user), "expires_at": invitation.expires_at, "token": invitation.token}
    print_one(shown, as_json=as_json, once="token")


@users.command()
@flag("--token", env="SETTLER_INVITATION_TOKEN", prompt=True, hide_input=True, help="As it was printed.")
@_password
@state_dir_flag()
@json_flag()
def accept(token: str, password: str, state_dir: Path, as_json: bool) -> None:
    """Accept an invitation with a password."""
    accepted = with_relay(state_dir, lambda pool: UserService(pool).accept(token, password))
    print_one(asdict(accepted), as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("user")
@click.argument("role", type=_ROLE)
@state_dir_flag()
@json_flag()
def role(tenant: str, user: str, role: str, state_dir: Path, as_json: bool) -> None:
    """Give a user another role."""
    changed = with_relay(
        state_dir, lambda pool: UserService(pool).change_role(tenant_id_of(tenant), user, Role(role), actor=ACTOR)
    )
    print_one(asdict(changed), as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("user")
@state_dir_flag()
@json_flag()
def disable(tenant: str, user: str, state_dir: Path, as_json: bool) -> None:
    """Keep a user out."""
    changed = with_relay(state_dir, lambda pool: UserService(pool).disable(tenant_id_of(tenant), user, actor=ACTOR))
    print_one(asdict(changed), as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("user")
@state_dir_flag()
@json_flag()
def enable(tenant: str, user: str, state_dir: Path, as_json: bool) -> None:
    """Let a user who was disabled in again."""
    changed = with_relay(state_dir, lambda pool: UserService(pool).enable(tenant_id_of(tenant), user, actor=ACTOR))
    print_one(asdict(changed), as_json=as_json)


@users.command()
@click.argument("tenant")
@click.argument("user")
@state_dir_flag()
@json_flag()
def remove(tenant: str, user: str, state_dir: Path, as_json: bool) -> None:
    """Remove a user, or take an invitation back."""
    with_relay(state_dir, lambda pool: UserService(pool).remove(tenant_id_of(tenant), user, actor=ACTOR))
    if as_json:
        print_json({"removed": user})
    else:
        click.echo(f"{user} removed")
