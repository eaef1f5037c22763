"""The platform, for commands that wait for admission."""

import sys
from collections.abc import Iterator

import pytest
import structlog

from tests.services_layer.platform import new_settings, platform

__all__ = ["new_settings", "platform"]


@pytest.fixture(scope="module", autouse=True)
def logs_apart() -> Iterator[None]:
    """What the folds in this process log does not belong to what a command prints."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))
    yield
    structlog.configure(**before)
