"""``settler topology``: the declared topics against the broker's."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path

import click

from settler_streams.adapters.kafka import acls as rules
from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.cli.output import EXIT_DIFFERS, flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.settings import Settings
from settler_streams.topology import load_topology


@click.group()
def topology() -> None:
    """Compare the declared topics with the broker, and put the broker right."""


@topology.command()
@state_dir_flag()
@json_flag()
def plan(state_dir: Path, as_json: bool) -> None:
    """Show what `apply` would change. Exit code 0: nothing; 3: something."""
    differences = asyncio.run(_compare(settings_of(state_dir)))
    _print(differences, as_json=as_json)
    sys.exit(EXIT_DIFFERS if differences else 0)


@topology.command()
@state_dir_flag()
@json_flag()
def apply(state_dir: Path, as_json: bool) -> None:
    """Create missing topics and set differing configuration. Partition counts are never changed."""
    _print(asyncio.run(_apply(settings_of(state_dir))), as_json=as_json)


@topology.command()
@state_dir_flag()
@json_flag()
def check(state_dir: Path, as_json: bool) -> None:
    """Say whether the broker is as declared. Exit code 0: it is; 3: it differs."""
    differences = asyncio.run(_compare(settings_of(state_dir)))
    if as_json:
        print_json({"agrees": not differences, "differences": len(differences)})
    else:
        _print(differences, as_json=False)
        if differences:
            click.echo("`settler topology apply` repairs what can be repaired", err=True)
    sys.exit(EXIT_DIFFERS if differences else 0)


@topology.command()
@flag(
    "--as",
    "chosen",
    env="SETTLER_ACL_AS",
    metavar="ROLE=PRINCIPAL",
    multiple=True,
    help="Who plays a role; repeatable.",
)
@flag("--apply", "do_apply", env="SETTLER_ACL_APPLY", is_flag=True, help="Create those that the broker does not have.")
@flag(
    "--check",
    "do_check",
    env="SETTLER_ACL_CHECK",
    is_flag=True,
    help="Say which the broker does not have. Exit code 3: some.",
)
@state_dir_flag()
@json_flag()
def acls(chosen: tuple[str, ...], do_apply: bool, do_check: bool, state_dir: Path, as_json: bool) -> None:
    """Show who may do what on Kafka: the topology's writers and readers as access control lists.

    Each role is a principal of its own, User:<deployment>-<role>, unless --as names another; a process that plays
    several roles with one login is named for each of them. ACLs beyond these are neither shown nor removed.
    """
    if do_apply and do_check:
        raise click.UsageError("--apply and --check exclude each other")
    settings = settings_of(state_dir)
    wanted = rules.permissions(load_topology(), settings.deployment, _principals(settings, chosen))
    if do_apply or do_check:
        wanted = asyncio.run(_missing(settings, wanted, create=do_apply))
    if as_json:
        print_json([{**asdict(p), "resource": p.resource.name, "match": p.match.name, "operation": p.operation.name}
                    for p in wanted])  # fmt: skip
    elif wanted:
        rows = [(p.principal, p.operation.name, p.resource.name, p.match.name, p.name) for p in wanted]
        print_table(("principal", "may", "on", "match", "name"), rows)
    else:
        click.echo("the broker has every rule that the topology asks for")
    sys.exit(EXIT_DIFFERS if do_check and wanted else 0)


def _principals(settings: Settings, chosen: tuple[str, ...]) -> dict[str, str]:
    pairs = [choice.partition("=") for choice in chosen]
    if wrong := [role for role, equals, _ in pairs if not equals]:
        raise click.UsageError(f"--as takes ROLE=PRINCIPAL, not {wrong[0]!r}")
    given = {role: principal for role, _, principal in pairs}
    return rules.principals(load_topology(), settings.deployment, given)


async def _missing(settings: Settings, wanted: list[rules.Permission], *, create: bool) -> list[rules.Permission]:
    async with Cluster.of(settings).admin() as client:
        absent = await rules.missing(client, wanted)
        if create and absent:
            await rules.grant(client, absent)
        return absent


async def _compare(settings: Settings) -> list[broker.Difference]:
    async with Cluster.of(settings).admin() as client:
        return await broker.compare(client, load_topology().declared(settings.deployment))


async def _apply(settings: Settings) -> list[broker.Difference]:
    async with Cluster.of(settings).admin() as client:
        declared = load_topology().declared(settings.deployment)
        return await broker.apply(client, declared, settings.kafka_replication_factor)


def _print(differences: list[broker.Difference], *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(difference) for difference in differences])
    elif differences:
        rows = [(d.topic, d.what, d.live, d.declared, "" if d.repairable else "not repairable") for d in differences]
        print_table(("topic", "what", "live", "declared", ""), rows)
    else:
        click.echo(f"the broker is as declared: {len(load_topology().declared(''))} topics")
