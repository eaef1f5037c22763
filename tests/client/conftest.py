"""The platform that the tests of this folder share."""

from tests.services_layer.platform import new_settings, platform

__all__ = ["new_settings", "platform"]
