"""``settler env``: the variables that make any program speak to the same system."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from settler_streams.cli.output import json_flag, print_json, state_dir_flag
from settler_streams.cli.target import settings_of


@click.command()
@state_dir_flag()
@json_flag()
def env(state_dir: Path, as_json: bool) -> None:
    """Print the settings as variables, passwords included: `eval "$(settler env)"`."""
    variables = settings_of(state_dir).environment()
    if as_json:
        print_json(variables)
        return
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")
