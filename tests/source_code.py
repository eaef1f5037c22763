"""Modules as syntax trees, for the tests that look at the code itself."""

from __future__ import annotations

import ast
from pathlib import Path

ATTEMPTS_MAX = 20


def parsed(path: Path) -> ast.Module:
    """The module's syntax tree."""
    text = path.read_text(encoding="utf-8")
    for _ in range(ATTEMPTS_MAX - 1):
        try:
            return ast.parse(text, str(path))
        except SystemError:
            # CPython 3.11 (gh-106905): another thread that formats a traceback, as loggers of the services' clients do,
            # parses at the same moment, and both count their depth in one place.
            continue
    return ast.parse(text, str(path))
