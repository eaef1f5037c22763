"""What commands have in common: their shared flags, and how they print for people and for machines."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import platformdirs
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from settler_streams.errors import Disposition

EXIT_CODES = {
    Disposition.HALT: 1,
    Disposition.REFUSE: 4,
    Disposition.DEAD_LETTER: 65,  # sysexits: EX_DATAERR
    Disposition.RETRY: 75,  # sysexits: EX_TEMPFAIL
}
WIDTH_OF_A_PIPE = 100_000
"""Without a terminal, a line is as long as its row: what reads it wants whole values."""
EXIT_DIFFERS = 3
"""Nothing went wrong, and yet it is not as it should be."""

F = TypeVar("F", bound=Callable[..., Any])


def flag(*names: str, env: str, **attributes: Any) -> Callable[[F], F]:
    """An option whose help shows its environment twin."""
    return click.option(*names, envvar=env, show_envvar=True, show_default=True, **attributes)


json_flag = functools.partial(flag, "--json", "as_json", env="SETTLER_JSON", is_flag=True, help="Print JSON.")
state_dir_flag = functools.partial(
    flag,
    "--state-dir",
    env="SETTLER_STATE_DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(platformdirs.user_state_dir("settler-streams")),
    help="Where the local system keeps its data, logs and processes.",
)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(document, indent=2, default=str))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table for people; whole lines without a terminal.

    No value is taken for markup, or cut while each column has room for a character: what is too long for a terminal
    goes on in the next line. The first column, where ids are, does not if that leaves the others half of the width.
    """
    cells = [[_text(value) for value in row] for row in rows]
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_PIPE
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, heading in enumerate(headings):
        longest = max(cell_len(each) for each in (heading, *(row[place] for row in cells)))
        # Never no_wrap for what may not fit: rich cuts it, whatever overflow says.
        table.add_column(heading, overflow="fold", no_wrap=place == 0 and longest <= console.width // 2)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _text(value: object) -> str:
    """A cell's: several things with commas between them, named ones as options take them (``storage=1000000``)."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
