"""Runs a command in this process: to start another one, with all that it imports, takes a second of processor time."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import structlog
from click.testing import CliRunner

from settler_streams.cli.main import settler
from settler_streams.cli.output import EXIT_CODES
from settler_streams.errors import SettlerError


def invoke(arguments: Sequence[str], environment: Mapping[str, str], given: str = "") -> tuple[int, Any, str]:
    """The exit code that the process would have, its JSON (None when it prints none), and the error that it would show.

    Blocks, and has an event loop of its own: for a thread without one.
    """
    with logs_as_they_were():
        ended = CliRunner().invoke(settler, [*arguments, "--json"], input=given, env=environment)
    if isinstance(ended.exception, SettlerError):
        return EXIT_CODES[ended.exception.disposition], None, str(ended.exception)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), repr(ended.exception)
    return ended.exit_code, json.loads(ended.stdout or "null"), ended.stderr


def shown(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What the command prints for people, once it has succeeded. Blocks as :func:`invoke`."""
    with logs_as_they_were():
        ended = CliRunner().invoke(settler, list(arguments), env=environment)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


@contextlib.contextmanager
def logs_as_they_were() -> Iterator[None]:
    """Whatever the command line configures for its process, this one keeps its own."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level
        structlog.configure(**before)
