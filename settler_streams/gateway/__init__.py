"""The HTTP front door."""

from settler_streams.gateway.app import create_app
from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.serve import serve

__all__ = ["Gateway", "create_app", "serve"]
