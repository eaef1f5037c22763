"""``settler migrate``: bring the database to the published schema, or back to an earlier one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from settler_streams.adapters.postgres import migrations
from settler_streams.cli.output import flag, json_flag, print_json, state_dir_flag
from settler_streams.cli.target import settings_of


@click.command()
@flag(
    "--to",
    env="SETTLER_MIGRATE_TO",
    type=click.IntRange(0, 9999),
    default=None,
    help="Number of the migration to arrive at, forward or back; 0 undoes all. Without it, the last one.",
)
@flag(
    "--discard-data",
    env="SETTLER_DISCARD_DATA",
    is_flag=True,
    help="On the way back, delete what has no place in the earlier schema; refused otherwise.",
)
@state_dir_flag()
@json_flag()
def migrate(to: int | None, discard_data: bool, state_dir: Path, as_json: bool) -> None:
    """Create roles and database where missing, and apply new migrations. Safe to run from several processes."""
    settings = settings_of(state_dir)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        schemas = bar.add_task("schemas of tenants", total=None, visible=False)
        done = asyncio.run(
            migrations.migrate_to(
                settings,
                to,
                discard_data=discard_data,
                progress=lambda done, of: bar.update(schemas, completed=done, total=of, visible=True),
            )
        )
    if as_json:
        print_json(done._asdict())
    else:
        lines = [f"applied {name}" for name in done.applied] + [f"undone {name}" for name in done.undone]
        click.echo("\n".join(lines) or "nothing to do")
