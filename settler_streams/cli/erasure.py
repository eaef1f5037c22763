"""``settler tenants erase``: what was deleted, once its grace period is over, for good."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import ACTOR, directory_of, tenant_id_of
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId
from settler_streams.services import Erasure, ErasureService, TenantService
from settler_streams.settings import Settings


@click.command()
@click.argument("tenant", required=False)
@flag("--due", env="SETTLER_ERASE_DUE", is_flag=True, help="All that `erasable` lists, and what was not finished.")
@flag("--yes", env="SETTLER_ERASE_YES", is_flag=True, help="Do not ask; for programs.")
@state_dir_flag()
@json_flag()
def erase(tenant: str | None, due: bool, yes: bool, state_dir: Path, as_json: bool) -> None:
    """Erase a deleted tenant for good: its state, files, cache and rows. Nothing brings it back.

    A record stays of who asked, when, and how much there was. What was stopped half-way, by whatever, is continued by
    the same command. Asks for the tenant's id or slug, with --due for the number of tenants, of which one that is
    refused holds up no other; it is named at the end.
    """
    if (tenant is None) is not due:
        raise InvalidRequestError("name one tenant, or say --due")
    settings = settings_of(state_dir)
    tenants = asyncio.run(_due(settings)) if tenant is None else [tenant_id_of(tenant)]
    if not yes and tenants:
        _confirm(settings, tenants, due=due)
    erased, refused = asyncio.run(_erase(settings, tenants, due=due))
    records = [_document(record) for record in erased]
    if as_json:
        print_json(records if due else records[0])
    else:
        for record in records:
            print_table(("", ""), record.items())
        if not tenants:
            click.echo("nothing is due")
    if refused:
        raise ConflictError("; ".join(refused))


def _confirm(settings: Settings, tenants: list[TenantId], *, due: bool) -> None:
    """Whoever erases has to say what.

    Raises:
        InvalidRequestError: something else was typed; nothing was erased.
    """
    if due:
        click.echo("\n".join(tenants), err=True)
        what, accepted = f"the number of these tenants, {len(tenants)},", {str(len(tenants))}
    else:
        what, accepted = "the tenant's id or slug", {tenants[0], *asyncio.run(_slugs(settings, tenants[0]))}
    click.echo(f"Nothing brings back what is erased. Type {what} to erase: ", err=True, nl=False)
    if click.get_text_stream("stdin").readline().strip() not in accepted:  # a prompt would write into the JSON
        raise InvalidRequestError(f"that is not {what}: nothing was erased")


async def _slugs(settings: Settings, tenant_id: TenantId) -> set[str]:
    """The slug, while there is one."""
    async with TenantService.connect(settings) as service:
        try:
            return {(await service.get(tenant_id)).slug}
        except NotFoundError:
            return set()  # its erasure has begun, or there is no such tenant, which is said later


async def _due(settings: Settings) -> list[TenantId]:
    """What has begun and not ended, then what is due, children first."""
    async with directory_of(settings) as directory, TenantService.connect(settings) as tenants:
        async with ErasureService.connect(settings) as erasures:
            begun = await erasures.unfinished(directory)
        return [*begun, *(tenant.id for tenant in await tenants.erasable(directory))]


async def _erase(settings: Settings, tenants: list[TenantId], *, due: bool) -> tuple[list[Erasure], list[str]]:
    """What was erased; with ``due`` also why each of the others was refused, which ends it otherwise."""
    erased, refused = list[Erasure](), list[str]()
    async with ErasureService.connect(settings) as service:
        for tenant_id in tenants:
            try:
                record = await service.erase(tenant_id, actor=ACTOR, progress=lambda done: click.echo(done, err=True))
            except ConflictError as error:
                if not due:
                    raise
                refused.append(str(error))
            else:
                erased.append(record)
    return erased, refused


def _document(record: Erasure) -> dict[str, Any]:
    document = asdict(record)
    document["steps"] = list(record.steps)
    return document
