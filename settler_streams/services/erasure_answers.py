"""Who has forgotten an erased tenant: each fold that keeps something of tenants says so when it does not any more."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from settler_streams.errors import UnavailableError
from settler_streams.events import Envelope, Part, TenantForgotten
from settler_streams.ids import TenantId
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings

FORGOTTEN_WITHIN_S = 60.0
"""Longest wait: running folds answer within a second, a take-over after a crash lasts as long as a session timeout."""

Fold = tuple[str, int]
"""A role and a partition."""


class Heard:
    """What was heard of one erasure so far."""

    def __init__(self) -> None:
        self.folds: set[tuple[str, int, int]] = set()
        self.more = asyncio.Event()

    async def wait(self, version: int, folds: Collection[Fold]) -> None:
        """Until each of ``folds`` has forgotten the tenant, by the erasure of ``version``.

        Raises:
            UnavailableError: one has not within :data:`FORGOTTEN_WITHIN_S`; the message names it.
        """
        wanted = {(role, partition, version) for role, partition in folds}
        try:
            async with asyncio.timeout(FORGOTTEN_WITHIN_S):
                while not wanted <= self.folds:
                    self.more.clear()
                    await self.more.wait()
        except TimeoutError as error:
            silent = ", ".join(f"{role} {partition}" for role, partition, _ in sorted(wanted - self.folds))
            raise UnavailableError(
                f"not heard within {FORGOTTEN_WITHIN_S:.0f} s of having forgotten the tenant: {silent}; "
                "see that workers run these folds, and run it again"
            ) from error


class ErasureAnswers:
    """Follows ``tenant-signals`` from its end. A wait begins before the erasure is published, so none is missed."""

    def __init__(self, settings: Settings) -> None:
        self._heard: dict[TenantId, list[Heard]] = {}
        self.feed = TopicFeed(settings, "tenant-signals", self._signalled, start="end")

    async def start(self) -> None:
        """Take position at the end of the signals."""
        await self.feed.start()

    async def stop(self) -> None:
        """Stop following."""
        await self.feed.stop()

    @contextmanager
    def expect(self, tenant_id: TenantId) -> Iterator[Heard]:
        """Listen for the tenant's erasure from here on."""
        heard = Heard()
        listening = self._heard.setdefault(tenant_id, [])
        listening.append(heard)
        try:
            yield heard
        finally:
            listening.remove(heard)
            if not listening:
                self._heard.pop(tenant_id, None)

    def _signalled(self, event: Envelope[Part]) -> None:
        body = event.data
        if not isinstance(body, TenantForgotten):
            return
        for heard in self._heard.get(event.tenantid, ()):
            heard.folds.add((body.role, body.partition, body.version))
            heard.more.set()
