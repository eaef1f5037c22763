"""Connections: one that does not bring a whole request head in time is closed, so that silent ones take no places."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_DEADLINE_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its head: one packet for any real client.
Uvicorn has no such bound, and refuses everybody while as many connections as it may have stay open in silence."""


class BoundedConnection(H11Protocol):
    """Uvicorn's connection, with the deadline; one that says nothing between requests has the keep-alive's instead."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is due."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_DEADLINE_S, self._close_overdue)

    def data_received(self, data: bytes) -> None:
        """A head is due from its first byte on; more bytes win no more time, only its end does."""
        super().data_received(data)
        if not self._between_requests():
            self._cancel()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_DEADLINE_S, self._close_overdue)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._cancel()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_overdue(self) -> None:
        self._deadline = None
        if self._between_requests():
            self.transport.close()

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
