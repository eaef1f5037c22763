"""``settler tenants quotas``: a tenant's limits, its own and its tier's, shown and changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import click

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.tenant_calls import ACTOR, tenant_id_of, with_service
from settler_streams.errors import InvalidRequestError
from settler_streams.events import QuotaType
from settler_streams.services import Tenant, TenantService
from settler_streams.tiers import load_tiers

QUOTA = click.Choice([quota.value for quota in QuotaType])
L = TypeVar("L", int, int | None)

COLUMNS = ("own", "tier", "limit", "holds")


class QuotaLimit(click.ParamType):
    """A quota and a limit, as ``storage=1000000``."""

    name = "name=limit"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[QuotaType, int]:
        """The two; which limits are too large is for the service to say."""
        name, _, limit = value.partition("=")
        quota = QuotaType(QUOTA.convert(name, param, ctx))
        try:
            return quota, int(limit)
        except ValueError:
            self.fail(f"{value!r} gives no whole number, as {name}=100 does", param, ctx)


@click.command()
@click.argument("tenant")
@flag(
    "--set",
    "given",
    env="SETTLER_QUOTAS_SET",
    type=QuotaLimit(),
    multiple=True,
    help="A limit of its own, such as storage=1000000; may be given several times.",
)
@flag(
    "--unset",
    "taken",
    env="SETTLER_QUOTAS_UNSET",
    type=QUOTA,
    multiple=True,
    help="Its tier's limit again; may be given several times.",
)
@state_dir_flag()
@json_flag()
def quotas(
    tenant: str, given: tuple[tuple[QuotaType, int], ...], taken: tuple[str, ...], state_dir: Path, as_json: bool
) -> None:
    """Show a tenant's limits, or change some of its own; its other limits stay, and admission knows at once.

    Its parents' limits hold as well. An Enterprise tenant is measured and never refused.
    """
    changes = limits_of((*given, *((QuotaType(name), None) for name in taken)))

    async def work(service: TenantService) -> Tenant:
        if changes:
            return await service.adjust_quotas(tenant_id_of(tenant), changes, actor=ACTOR)
        return await service.get(tenant_id_of(tenant))

    found = with_service(state_dir, work)
    limits = _limits(found)
    if as_json:
        print_json({"tenant": found.id, "version": found.version, "tier": found.tier, "quotas": limits})
    else:
        print_table(("quota", *COLUMNS), ((name, *(limit[each] for each in COLUMNS)) for name, limit in limits.items()))


def limits_of(given: tuple[tuple[QuotaType, L], ...]) -> dict[QuotaType, L]:
    """What was given several times over, by quota.

    Raises:
        InvalidRequestError: one quota came twice.
    """
    limits: dict[QuotaType, L] = {}
    for quota, limit in given:
        if quota in limits:
            raise InvalidRequestError(f"{quota.value} is given twice; say once what its limit is to be")
        limits[quota] = limit
    return limits


def _limits(tenant: Tenant) -> dict[str, dict[str, Any]]:
    """Of each quota the tenant's own limit (None without one), its tier's, the one that holds, and whose that is."""
    return {
        quota.value: {
            "own": (own := tenant.quotas.get(quota)),
            "tier": tiers,
            "limit": tiers if own is None else own,
            "holds": "tier" if own is None else "own",
        }
        for quota, tiers in load_tiers()[tenant.tier].limits().items()
    }
