"""``settler tenants list``: every tenant that there is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from settler_streams.cli.output import flag, json_flag, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import (
    TENANT_COLUMNS,
    directory_of,
    page_flags,
    print_many,
    tenant_document,
    tenant_id_of,
)
from settler_streams.events import TenantStatus, TenantTier
from settler_streams.services import Tenant, TenantService, list_tenants


@click.command("list")
@page_flags
@flag(
    "--status",
    env="SETTLER_LIST_STATUS",
    type=click.Choice([status.value for status in TenantStatus]),
    default=None,
    help="Only those that are it.",
)
@flag(
    "--tier",
    env="SETTLER_LIST_TIER",
    type=click.Choice([tier.value for tier in TenantTier]),
    default=None,
    help="Only those in it.",
)
@state_dir_flag()
@json_flag()
def list_(after: str | None, limit: int, status: str | None, tier: str | None, state_dir: Path, as_json: bool) -> None:
    """List all tenants by id, the oldest first, the deleted among them; fewer than --limit are the last."""
    behind = None if after is None else tenant_id_of(after)

    async def work() -> list[Tenant]:
        settings = settings_of(state_dir)
        async with TenantService.connect(settings) as service, directory_of(settings) as directory:
            return await list_tenants(
                directory,
                service.get,
                after=behind,
                limit=limit,
                status=None if status is None else TenantStatus(status),
                tier=None if tier is None else TenantTier(tier),
            )

    found = asyncio.run(work())
    print_many(TENANT_COLUMNS, [tenant_document(tenant) for tenant in found], as_json=as_json)
