"""Stacks of one temporary state directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from settler_streams.dev.stack import EmbeddedStack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., EmbeddedStack]]:
    """Stacks of one state directory; all is stopped and deleted at the end, also after a failure."""
    home = tmp_path / "stack"

    def stack(**options) -> EmbeddedStack:
        return EmbeddedStack(home, environ=options.pop("environ", {}), **options)

    yield stack
    stack().destroy()
    assert not home.exists()
