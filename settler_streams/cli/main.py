"""``settler``: the command line's entry, which finds its commands by name and turns errors into exit codes.

Exit codes: 0 done; 1 cannot go on, or interrupted; 2 wrong usage; 3 it is not as it should be (topics differ, the
system is not up); 4 refused, change the request; 65 a record is at fault; 75 try again later. ``settler worker`` has
its own, see its help.
"""

from __future__ import annotations

import importlib
import sys

import click
import structlog

from settler_streams import __version__
from settler_streams.cli.output import EXIT_CODES
from settler_streams.errors import SettlerError

COMMANDS = {
    "demo": "settler_streams.cli.demo:demo",
    "up": "settler_streams.cli.local:up",
    "down": "settler_streams.cli.local:down",
    "status": "settler_streams.cli.local:status",
    "env": "settler_streams.cli.env:env",
    "tenants": "settler_streams.cli.tenants:tenants",
    "worker": "settler_streams.cli.processes:worker",
    "executor": "settler_streams.cli.processes:executor",
    "courier": "settler_streams.cli.processes:courier",
    "gateway": "settler_streams.cli.processes:gateway",
    "topology": "settler_streams.cli.topology:topology",
    "migrate": "settler_streams.cli.migrate:migrate",
    "dlq": "settler_streams.cli.dlq:dlq",
    "bench": "settler_streams.cli.bench:bench",
    "schemas": "settler_streams.cli.schemas:schemas",
}
"""Each command is imported when it is called for, so that none waits for the libraries of another."""


class Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Their names, in the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="settler")
def settler() -> None:
    """Event-driven, multi-tenant stream processing.

    Every flag can be given in the environment, by the name in its help. Without settings of your own (DB_HOST,
    REDIS_HOST, KAFKA_BOOTSTRAP_SERVERS) commands speak to the local system of `settler up`.
    """


def main() -> None:
    """Run the command line and exit with a code that means something."""
    # What a service logs on the way is not part of the answer; a process that runs on has a form of its own for it.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        settler(prog_name="settler")
    except SettlerError as error:
        click.echo(f"settler: {error}", err=True)
        sys.exit(EXIT_CODES[error.disposition])


if __name__ == "__main__":
    main()
