"""``settler tenants keys``: a tenant's API keys over time."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

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
from settler_streams.errors import InvalidRequestError
from settler_streams.services import ApiKey, ApiKeys, IssuedApiKey, Scope

_SCOPES = [scope.value for scope in Scope]
_DAYS = click.IntRange(1, 3650)


@click.group()
def keys() -> None:
    """Issue, list, change, replace and revoke API keys."""


@keys.command("list")
@click.argument("tenant")
@page_flags
@state_dir_flag()
@json_flag()
def list_(tenant: str, after: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """List keys, those no longer in force among them. The keys themselves are stored nowhere."""
    found = with_pool(state_dir, lambda pool: ApiKeys(pool).list(tenant_id_of(tenant), after=after, limit=limit))
    columns = ("id", "name", "in_force", "scopes", "created_at", "expires_at", "revoked_at")
    print_many(columns, [_document(key) for key in found], as_json=as_json)


@keys.command()
@click.argument("tenant")
@flag(
    "--scope",
    "scopes",
    env="SETTLER_KEY_SCOPES",
    multiple=True,
    type=click.Choice(_SCOPES),
    default=_SCOPES,
    help="What the key may do; may be given several times.",
)
@flag("--name", env="SETTLER_KEY_NAME", default="default", help="What it is for.")
@flag("--days", env="SETTLER_KEY_DAYS", type=_DAYS, default=None, help="How long it holds; unset: until revoked.")
@state_dir_flag()
@json_flag()
def issue(tenant: str, scopes: tuple[str, ...], name: str, days: int | None, state_dir: Path, as_json: bool) -> None:
    """Issue a key. It is shown this once."""
    issued = with_relay(
        state_dir,
        lambda pool: ApiKeys(pool).issue(
            tenant_id_of(tenant), scopes, name=name, expires_at=_in_days(days), actor=ACTOR
        ),
    )
    print_one(_issued(issued), as_json=as_json, once="key")


@keys.command()
@click.argument("tenant")
@click.argument("key")
@flag(
    "--scope",
    "scopes",
    env="SETTLER_KEY_NEW_SCOPES",  # not that of `issue`: what is set for new keys must not widen an old one
    multiple=True,
    type=click.Choice(_SCOPES),
    required=True,
    help="What the key may do, and nothing else; may be given several times.",
)
@state_dir_flag()
@json_flag()
def scopes(tenant: str, key: str, scopes: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Let the key of this id do exactly what is said, from its next request on."""
    changed = with_relay(
        state_dir, lambda pool: ApiKeys(pool).change_scopes(tenant_id_of(tenant), key, scopes, actor=ACTOR)
    )
    print_one(_document(changed), as_json=as_json)


@keys.command()
@click.argument("tenant")
@click.argument("key")
@flag("--days", env="SETTLER_KEY_EXPIRY_DAYS", type=_DAYS, default=None, help="It ends so long from now.")
@flag("--never", env="SETTLER_KEY_EXPIRY_NEVER", is_flag=True, help="It holds until it is revoked.")
@state_dir_flag()
@json_flag()
def expiry(tenant: str, key: str, days: int | None, never: bool, state_dir: Path, as_json: bool) -> None:
    """Say when the key of this id ends: either in so many days, or never."""
    if (days is None) is not never:
        raise InvalidRequestError("say when the key ends: either --days or --never")
    changed = with_relay(
        state_dir, lambda pool: ApiKeys(pool).change_expiry(tenant_id_of(tenant), key, _in_days(days), actor=ACTOR)
    )
    print_one(_document(changed), as_json=as_json)


@keys.command()
@click.argument("tenant")
@click.argument("key")
@flag(
    "--overlap-hours",
    env="SETTLER_KEY_OVERLAP_HOURS",
    type=click.IntRange(0, 720),
    default=24,
    help="How long the old key still holds.",
)
@state_dir_flag()
@json_flag()
def rotate(tenant: str, key: str, overlap_hours: int, state_dir: Path, as_json: bool) -> None:
    """Replace the key of this id by a new one, which is shown this once. Both hold meanwhile."""
    issued = with_relay(
        state_dir,
        lambda pool: ApiKeys(pool).rotate(
            tenant_id_of(tenant), key, overlap=dt.timedelta(hours=overlap_hours), actor=ACTOR
        ),
    )
    print_one(_issued(issued), as_json=as_json, once="key")


@keys.command()
@click.argument("tenant")
@click.argument("key")
@state_dir_flag()
@json_flag()
def revoke(tenant: str, key: str, state_dir: Path, as_json: bool) -> None:
    """End the key of this id; its next request is refused."""
    with_relay(state_dir, lambda pool: ApiKeys(pool).revoke(tenant_id_of(tenant), key, actor=ACTOR))
    if as_json:
        print_json({"revoked": key})
    else:
        click.echo(f"{key} revoked")


def _in_days(days: int | None) -> dt.datetime | None:
    return None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def _document(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "in_force": key.in_force(dt.datetime.now(dt.UTC)),
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _issued(key: IssuedApiKey) -> dict[str, Any]:
    return {"id": key.id, "key": key.key, "scopes": sorted(key.scopes), "expires_at": key.expires_at}
