"""Event-driven, multi-tenant stream processing for the Settler reconciliation platform."""

__version__ = "0.1.0"
