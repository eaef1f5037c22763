"""``settler tenants schema``: which tenants have a schema of their own, moving them, and comparing layouts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from settler_streams.adapters.postgres import tenant_schemas
from settler_streams.cli.output import EXIT_DIFFERS, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import ACTOR, tenant_id_of, with_relay
from settler_streams.services import move_tenant
from settler_streams.settings import Settings


@click.group()
def schema() -> None:
    """Schemas of single tenants. New tenants get one while ENABLE_SCHEMA_PER_TENANT is true."""


@schema.command()
@click.argument("tenant")
@click.argument("to", type=click.Choice(["own", "shared"]))
@state_dir_flag()
@json_flag()
def move(tenant: str, to: str, state_dir: Path, as_json: bool) -> None:
    """Move a tenant's rows into a schema of its own, or back. All or none; its transactions wait meanwhile."""
    tenant_id = tenant_id_of(tenant)
    settings = settings_of(state_dir)
    moved = with_relay(state_dir, lambda _: move_tenant(settings, tenant_id, own_schema=to == "own", actor=ACTOR))
    if as_json:
        print_json({"moved_rows": moved})
    else:
        click.echo(f"{moved} rows moved")


@schema.command()
@state_dir_flag()
@json_flag()
def check(state_dir: Path, as_json: bool) -> None:
    """List the tenants' schemas, and in what each differs from the shared layout; exit code 3 if one does."""
    found = asyncio.run(_differences(settings_of(state_dir)))
    if as_json:
        print_json(found)
    else:
        rows = [(name, line) for name, lines in found.items() for line in lines or ["as it should be"]]
        print_table(("schema", "layout"), rows)
    if any(found.values()):
        raise SystemExit(EXIT_DIFFERS)


async def _differences(settings: Settings) -> dict[str, list[str]]:
    async with tenant_schemas.owner_connection(settings) as connection:
        return {
            name: await tenant_schemas.differences(connection, name)
            async for name in tenant_schemas.schemas(connection)
        }
