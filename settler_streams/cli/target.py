"""Which system a command speaks to: the one that the environment names, else the local one when it is there."""

from __future__ import annotations

from pathlib import Path

from settler_streams.dev.stack.stack import PARTS
from settler_streams.dev.system import LocalSystem
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings


def settings_of(state_dir: Path) -> Settings:
    """The settings for a command.

    Raises:
        ConfigurationError: a variable is wrong.
        UnavailableError: the local system is meant, and it is not up.
    """
    if not (state_dir / "services" / "state.json").exists():
        return Settings.from_environment()
    system = LocalSystem(state_dir)
    if system.stack.external == frozenset(PARTS):
        return Settings.from_environment()
    stopped = [part.name for part in system.stack.status() if part.state == "stopped"]
    if stopped and not system.stack.external:
        raise UnavailableError(f"the local system is not up ({', '.join(stopped)} stopped); `settler up` starts it")
    return system.settings
