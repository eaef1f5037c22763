"""``settler topology``: the declared topics against the broker's."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path

import click

from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.cli.output import EXIT_DIFFERS, json_flag, print_json, print_table, state_dir_flag
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
