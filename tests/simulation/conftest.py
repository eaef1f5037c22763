"""The simulation says nothing while it runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import structlog

from tests.simulation.many_seeds import quiet


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = structlog.get_config()
    quiet()
    yield
    gc.unfreeze()
    structlog.configure(**before)
