"""``settler tenants retention`` and ``sweep``: how long a tenant's past is kept, and deleting what is older."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import ACTOR, directory_of, pool_of, tenant_id_of, with_pool, with_relay
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId
from settler_streams.services import RetentionKind, RetentionService, Swept
from settler_streams.settings import Settings

FOR_EVER = "forever"


class Period(click.ParamType):
    """A number of days, or ``forever``."""

    name = "days"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Days as an int; the word stays."""
        if value == FOR_EVER:
            return value
        try:
            return int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a number of days nor {FOR_EVER!r}", param, ctx)


@click.command()
@click.argument("tenant")
@flag(
    "--executions",
    env="SETTLER_KEEP_EXECUTIONS",
    type=Period(),
    help="Ended jobs (also rejected ones) and their results.",
)
@flag("--usage", env="SETTLER_KEEP_USAGE", type=Period(), help="Usage, and what was signalled about it.")
@flag("--audit", env="SETTLER_KEEP_AUDIT", type=Period(), help="The audit log; 90 days at least.")
@state_dir_flag()
@json_flag()
def retention(
    tenant: str,
    executions: int | str | None,
    usage: int | str | None,
    audit: int | str | None,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Show how many days a tenant's past is kept, or change it; what is older is deleted within an hour."""
    given = zip(RetentionKind, (executions, usage, audit), strict=True)
    changed = {kind: None if days == FOR_EVER else int(days) for kind, days in given if days is not None}

    if changed:
        periods = with_relay(
            state_dir, lambda pool: RetentionService(pool).change(tenant_id_of(tenant), changed, actor=ACTOR)
        )
    else:
        periods = with_pool(state_dir, lambda pool: RetentionService(pool).get(tenant_id_of(tenant)))
    kept = {kind.value: FOR_EVER if days is None else days for kind, days in periods.items()}
    if as_json:
        print_json(kept)
    else:
        print_table(("kept", "days"), kept.items())


@click.command()
@click.argument("tenants", nargs=-1)
@state_dir_flag()
@json_flag()
def sweep(tenants: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Delete now what is past its period: of the tenants named, or of all."""
    wanted = [tenant_id_of(tenant) for tenant in tenants]

    async def work(settings: Settings) -> tuple[Swept, list[TenantId]]:
        async with pool_of(settings) as pool:
            service = RetentionService(pool)
            if not wanted:
                return await service.sweep_all(await _everybody(settings))
            swept = Swept()
            for tenant_id in wanted:
                swept += await service.sweep(tenant_id)
            return swept, []

    swept, unswept = asyncio.run(work(settings_of(state_dir)))
    if as_json:
        print_json(asdict(swept))
    else:
        print_table(("deleted", "rows"), asdict(swept).items())
    if unswept:
        raise UnavailableError(f"not swept, try again later: {', '.join(unswept)}")


async def _everybody(settings: Settings) -> list[TenantId]:
    async with directory_of(settings) as directory:
        return list(directory)
