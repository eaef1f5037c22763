"""The platform of the agents' tests, with an executor beside it."""

from __future__ import annotations

from tests.agents.conftest import platform, settings

__all__ = ["platform", "settings"]
