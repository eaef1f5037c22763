"""The platform that the tests of this folder share, and a gateway over it."""

from tests.gateway.gateways import gateway_url
from tests.services_layer.platform import new_settings, platform

__all__ = ["gateway_url", "new_settings", "platform"]
