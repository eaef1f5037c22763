"""Webhooks of tenants: which there are, where they may go, and how their secrets are kept."""

from settler_streams.services.webhooks.deliveries import Delivery, WebhookDeliveries
from settler_streams.services.webhooks.destinations import Destination, Rules
from settler_streams.services.webhooks.keyring import KeyRing, Sealed
from settler_streams.services.webhooks.service import IssuedSecret, Webhook, WebhookService

__all__ = [
    "Delivery",
    "Destination",
    "IssuedSecret",
    "KeyRing",
    "Rules",
    "Sealed",
    "Webhook",
    "WebhookDeliveries",
    "WebhookService",
]
