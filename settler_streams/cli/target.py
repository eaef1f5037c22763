"""Which system a command speaks to: the one that the environment names, else the local one when it is there."""

from __future__ import annotations

import os
from pathlib import Path

from settler_streams.dev.stack.stack import GIVEN_BY
from settler_streams.dev.system import LocalSystem
from settler_streams.settings import Settings


def settings_of(state_dir: Path) -> Settings:
    """The settings for a command.

    Raises:
        ConfigurationError: a variable is wrong.
    """
    named = all(os.environ.get(variable) for variable in GIVEN_BY.values())
    if named or not (state_dir / "services" / "state.json").exists():
        return Settings.from_environment()
    return LocalSystem(state_dir).settings
