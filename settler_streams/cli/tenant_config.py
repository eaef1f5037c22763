"""``settler tenants config`` and ``onboarding``: what a tenant has set up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import click

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.tenant_calls import ACTOR, tenant_id_of, with_pool, with_service
from settler_streams.errors import InvalidRequestError
from settler_streams.services import OnboardingService, Tenant


@click.group()
def config() -> None:
    """A tenant's configuration: a JSON object of its own, of 16 KiB at most."""


@config.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def show(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Print the configuration and the tenant's version, which `set --if-version` takes."""
    _print(with_service(state_dir, lambda service: service.get(tenant_id_of(tenant))), as_json=as_json)


@config.command("set")
@click.argument("tenant")
@click.argument("file", type=click.File("r", encoding="utf-8"))
@flag(
    "--if-version",
    env="SETTLER_IF_VERSION",
    type=click.IntRange(min=1),
    default=None,
    help="Refuse the change if the tenant has another version by now.",
)
@state_dir_flag()
@json_flag()
def set_(tenant: str, file: IO[str], if_version: int | None, state_dir: Path, as_json: bool) -> None:
    """Replace the configuration by the JSON object in FILE; `-` reads standard input."""
    try:
        document = json.load(file)
    except ValueError as error:
        raise InvalidRequestError(f"{file.name} is not JSON: {error}") from error
    changed = with_service(
        state_dir,
        lambda service: service.change_config(tenant_id_of(tenant), document, if_version=if_version, actor=ACTOR),
    )
    _print(changed, as_json=as_json)


@click.command()
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def onboarding(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Show how far a tenant has come: an owner, a key, a domain or webhook, a first job."""
    found = with_pool(state_dir, lambda pool: OnboardingService(pool).get(tenant_id_of(tenant)))
    if as_json:
        print_json({"done": found.done, "next": found.next, "steps": found.steps})
    else:
        print_table(("step", "done"), ((step, "yes" if done else "no") for step, done in found.steps.items()))


def _print(tenant: Tenant, *, as_json: bool) -> None:
    """The configuration alone for people, so that it can be edited and set again."""
    print_json({"version": tenant.version, "config": dict(tenant.config)} if as_json else dict(tenant.config))
