"""``settler migrate``: bring the database to the published schema."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from settler_streams.adapters.postgres import migrations
from settler_streams.cli.output import json_flag, print_json, state_dir_flag
from settler_streams.cli.target import settings_of


@click.command()
@state_dir_flag()
@json_flag()
def migrate(state_dir: Path, as_json: bool) -> None:
    """Create roles and database where missing, and apply new migrations. Safe to run from several processes."""
    settings = settings_of(state_dir)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        schemas = bar.add_task("schemas of tenants", total=None, visible=False)
        applied = asyncio.run(
            migrations.migrate(
                settings, progress=lambda done, of: bar.update(schemas, completed=done, total=of, visible=True)
            )
        )
    if as_json:
        print_json({"applied": applied})
    else:
        click.echo("\n".join(f"applied {name}" for name in applied) or "nothing to apply")
