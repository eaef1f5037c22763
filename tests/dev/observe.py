"""What tests read off a stack from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from settler_streams.dev.stack.state import State

if TYPE_CHECKING:
    from settler_streams.dev.stack import EmbeddedStack


def pids(stack: EmbeddedStack) -> dict[str, int | None]:
    return {part.name: part.pid for part in stack.status() if part.state == "running"}


def stored(stack: EmbeddedStack) -> State:
    return msgspec.json.decode((stack.state_dir / "state.json").read_bytes(), type=State)
