"""``settler tenants domains``: custom domains, proven by a TXT record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from settler_streams.adapters.dns_txt import DnsTxtRecords
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.cli.output import json_flag, print_json, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import (
    ACTOR,
    page_flags,
    print_many,
    print_one,
    tenant_id_of,
    with_pool,
    with_relay,
)
from settler_streams.services import Domain, DomainService


@click.group()
def domains() -> None:
    """Add, verify and remove a tenant's domains."""


@domains.command("list")
@click.argument("tenant")
@page_flags
@state_dir_flag()
@json_flag()
def list_(tenant: str, after: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """List domains, with the TXT record that proves each."""
    found = with_pool(
        state_dir,
        lambda pool: DomainService(pool, DnsTxtRecords()).list(tenant_id_of(tenant), after=after, limit=limit),
    )
    columns = ("id", "domain", "status", "record_name", "record_value")
    print_many(columns, [_document(domain) for domain in found], as_json=as_json)


@domains.command()
@click.argument("tenant")
@click.argument("domain")
@state_dir_flag()
@json_flag()
def add(tenant: str, domain: str, state_dir: Path, as_json: bool) -> None:
    """Add a domain, within the quota; prints the TXT record to set before it can be verified."""
    added = with_relay(
        state_dir, lambda pool: DomainService(pool, DnsTxtRecords()).add(tenant_id_of(tenant), domain, actor=ACTOR)
    )
    print_one(_document(added), as_json=as_json)


@domains.command()
@click.argument("tenant")
@click.argument("domain")
@state_dir_flag()
@json_flag()
def verify(tenant: str, domain: str, state_dir: Path, as_json: bool) -> None:
    """Ask the DNS for the record of the domain of this id; once verified, it counts."""

    async def work(pool: TenantConnectionPool) -> Domain:
        service = DomainService(pool, DnsTxtRecords(settings_of(state_dir).dns_nameservers))
        return await service.verify(tenant_id_of(tenant), domain, actor=ACTOR)

    print_one(_document(with_relay(state_dir, work)), as_json=as_json)


@domains.command()
@click.argument("tenant")
@click.argument("domain")
@state_dir_flag()
@json_flag()
def remove(tenant: str, domain: str, state_dir: Path, as_json: bool) -> None:
    """Remove the domain of this id; it counts no longer."""

    with_relay(
        state_dir, lambda pool: DomainService(pool, DnsTxtRecords()).remove(tenant_id_of(tenant), domain, actor=ACTOR)
    )
    if as_json:
        print_json({"removed": domain})
    else:
        click.echo(f"{domain} removed")


def _document(domain: Domain) -> dict[str, Any]:
    return {
        "id": domain.id,
        "domain": domain.domain,
        "status": domain.status,
        "record_type": "TXT",
        "record_name": domain.record_name,
        "record_value": domain.record_value,
        "verified_at": domain.verified_at,
    }
