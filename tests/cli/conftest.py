"""The platform, for commands that wait for admission."""

from tests.services_layer.platform import new_settings, platform

__all__ = ["new_settings", "platform"]
