"""Acknowledgements: who changed a tenant waits here until admission decides by the new version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from settler_streams.errors import UnavailableError
from settler_streams.events import Envelope, Part, TenantAcknowledged
from settler_streams.ids import TenantId
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings

ACKNOWLEDGED_WITHIN_S = 10.0
"""Longest wait: a running admission answers within tens of milliseconds, a take-over lasts seconds."""
WAITING_MAX = 10_000
"""Changes that may wait at a time; beyond it a change is refused before it is made."""


@dataclass(eq=False, slots=True)
class Awaited:
    """One change whose acknowledgement is waited for. Set ``version`` once it is known."""

    future: asyncio.Future[None]
    highest: int = 0

    async def wait(self, version: int) -> None:
        """Until admission has acknowledged ``version`` or a later one.

        Raises:
            UnavailableError: it has not within :data:`ACKNOWLEDGED_WITHIN_S`.
        """
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN_S):
                while self.highest < version:
                    await self.future
                    self.future = asyncio.get_running_loop().create_future()
        except TimeoutError as error:
            raise UnavailableError(f"admission did not answer within {ACKNOWLEDGED_WITHIN_S:.0f} s") from error


class Acknowledgements:
    """Follows ``tenant-signals`` from its end. A wait begins before the change, so none is missed."""

    def __init__(self, settings: Settings) -> None:
        self._awaited: dict[TenantId, list[Awaited]] = {}
        self._count = 0
        self.feed = TopicFeed(settings, "tenant-signals", self._signalled, start="end")

    async def start(self) -> None:
        """Take position at the end of the signals."""
        await self.feed.start()

    async def stop(self) -> None:
        """Stop following."""
        await self.feed.stop()

    @contextmanager
    def expect(self, tenant_id: TenantId) -> Iterator[Awaited]:
        """Listen for the tenant's acknowledgements from here on.

        Raises:
            UnavailableError: too many changes wait.
        """
        if self._count >= WAITING_MAX:
            raise UnavailableError(f"{WAITING_MAX} tenant changes wait for admission; try again later")
        awaited = Awaited(asyncio.get_running_loop().create_future())
        waiting = self._awaited.setdefault(tenant_id, [])
        waiting.append(awaited)
        self._count += 1
        try:
            yield awaited
        finally:
            self._count -= 1
            waiting.remove(awaited)
            if not waiting:
                self._awaited.pop(tenant_id, None)

    def _signalled(self, event: Envelope[Part]) -> None:
        body = event.data
        if not isinstance(body, TenantAcknowledged):
            return
        for awaited in self._awaited.get(event.tenantid, ()):
            awaited.highest = max(awaited.highest, body.version)
            if not awaited.future.done():
                awaited.future.set_result(None)
