"""``settler schemas``: where the published contract lies."""

from __future__ import annotations

import click

from settler_streams.cli.output import json_flag, print_json, print_table
from settler_streams.events import REGISTRY
from settler_streams.published import SCHEMAS


@click.command()
@json_flag()
def schemas(as_json: bool) -> None:
    """Print where the event schemas are, one JSON Schema per type and version."""
    paths = {event_type: str(SCHEMAS / "events" / f"{event_type}.json") for event_type in sorted(REGISTRY)}
    if as_json:
        print_json({"directory": str(SCHEMAS), "events": paths})
    else:
        print_table(("type", "schema"), paths.items())
