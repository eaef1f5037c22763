"""A deployment of its own for every test module of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services


@pytest.fixture(scope="module")
def settings(services: Services, kafka: Service, deployment: str) -> Settings:
    """Settings of the module's own deployment on the running broker."""
    return services.settings.model_copy(update={"deployment": deployment})
