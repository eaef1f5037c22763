"""Every key of one tenant in Valkey, found by its name: whatever is kept of a tenant has the tenant's id in its key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from settler_streams.adapters.valkey.connection import UNANSWERED, connect, disconnect
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.settings import Settings

CALL_S_MAX = 5.0
"""Longest wait for one answer."""
SCAN_S_MAX = 120.0
"""Longest look through all keys: a million of them take some seconds."""
SCAN_KEYS = 1_000
"""Keys that one answer is about."""


class TenantKeys:
    """Finds and deletes; works through every master of a cluster."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.deployment
        self._client = connect(settings, deadline_s=CALL_S_MAX)

    async def close(self) -> None:
        """Disconnect."""
        await disconnect(self._client)

    async def find(self, tenant_id: TenantId) -> list[bytes]:
        """The tenant's keys. Keys of its children below a root are found with those of the root.

        Raises:
            UnavailableError: Valkey did not answer.
        """
        async with _bounded():
            pattern = f"{self._prefix}:*{canonical_tenant(tenant_id)}*"
            return [key async for key in self._client.scan_iter(match=pattern, count=SCAN_KEYS)]

    async def delete(self, tenant_id: TenantId) -> int:
        """Delete them; returns how many were there. Errors as :meth:`find`."""
        keys = await self.find(tenant_id)
        async with _bounded():
            return sum([int(await self._client.delete(key)) for key in keys])  # one each: they lie in different slots


@asynccontextmanager
async def _bounded() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(SCAN_S_MAX):
            yield
    except UNANSWERED as error:
        raise UnavailableError(f"Valkey did not answer: {error!r}") from error
