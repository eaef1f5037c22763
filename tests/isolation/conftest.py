"""The databases that the proof of isolation runs on."""

from __future__ import annotations

from tests.adapters.postgres.conftest import cluster_settings, database_settings, owner, pool

__all__ = ["cluster_settings", "database_settings", "owner", "pool"]
