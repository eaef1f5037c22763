"""The outbox relay: events that a transaction left in Postgres reach Kafka.

At least once: an event leaves the outbox after the broker's acknowledgement, so a relay that dies in between publishes
it again, and the folds compare versions. In order: events leave by ascending id, and any number of relays may run,
since only one at a time holds the lock.
"""

from __future__ import annotations

import asyncio

import structlog

from settler_streams.adapters.postgres import outbox
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.errors import SettlerError, UnavailableError
from settler_streams.services.background import in_background
from settler_streams.services.publisher import Encoded, EventPublisher

log = structlog.get_logger(__name__)

BATCH_MAX = 500
"""Events of one transaction: they are acknowledged together, in well under a second."""
INTERVAL_S = 0.5
"""How long an event waits at most whose relay was not nudged, because its process died or another held the lock."""
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
"""Pauses after a failure, doubling; events stay in the outbox meanwhile."""
STOP_DEADLINE_S = 25.0
"""A batch under way ends within the publisher's deadline of 20 s."""


class OutboxRelay:
    """Publishes pending events in the background. :meth:`nudge` it after a commit to spare the interval."""

    def __init__(self, pool: TenantConnectionPool, publisher: EventPublisher) -> None:
        self._pool = pool
        self._publisher = publisher
        self._nudged = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin."""
        self._stopping = False
        self._task = in_background(self._run(), "outbox relay")

    async def stop(self) -> None:
        """End after the batch under way."""
        if self._task is None:
            return
        self._stopping = True
        self.nudge()
        await asyncio.wait([self._task], timeout=STOP_DEADLINE_S)
        self._task.cancel()
        await asyncio.wait([self._task])

    @property
    def running(self) -> bool:
        """Whether events still leave the outbox."""
        return self._task is not None and not self._task.done()

    def nudge(self) -> None:
        """There is something to publish."""
        self._nudged.set()

    async def publish_pending(self) -> int:
        """Publish one batch; returns how many events left the outbox.

        1. Read the oldest events, unless another relay is at work.
        2. Publish them; wait for every acknowledgement.
        3. Delete them and commit.

        Raises:
            UnavailableError: Postgres or Kafka failed; the events are still in the outbox.
        """
        async with self._pool.relay() as transaction:
            events = await outbox.pending(transaction, BATCH_MAX)
            if events:
                await self._publisher.publish_encoded([Encoded(e.topic, e.key, e.event) for e in events])
                await outbox.discard(transaction, events)
        return len(events)

    async def _run(self) -> None:
        pause_s = RETRY_MIN_S
        while not self._stopping:
            self._nudged.clear()
            try:
                published = await self.publish_pending()
            except UnavailableError as error:
                log.warning("outbox not published", error=str(error), retry_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
                continue
            except SettlerError as error:
                # No retry mends this one; it holds the events behind it back, and says so for as long as it lasts.
                log.error("outbox blocked", error=str(error))  # noqa: TRY400
                await asyncio.sleep(RETRY_MAX_S)
                continue
            pause_s = RETRY_MIN_S
            if published < BATCH_MAX:
                await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(INTERVAL_S):
                await self._nudged.wait()
        except TimeoutError:
            return
