"""The courier: a plain process that sends what the webhooks agent has queued. Any number of them share the work.

It leases lanes (one per webhook), in turns between tenants, and serves each for a few seconds. What one endpoint costs
is bounded by its lane, what one tenant costs by its share of the lanes, so a slow or dead endpoint keeps nobody else
waiting. A courier that dies loses nothing: its leases end, and what it had not recorded is sent again under the same
id.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import structlog

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.courier.lane import TURN_S, Lane, LaneRunner, new_lease
from settler_streams.courier.sender import Sender
from settler_streams.errors import NotFoundError, UnavailableError
from settler_streams.ids import TenantId
from settler_streams.services.webhooks import queries
from settler_streams.settings import Settings
from settler_streams.signals import stop_on_signals

log = structlog.get_logger(__name__)

LANES_PER_TENANT = 4
"""Of all couriers together: an eighth of one courier's lanes, however many webhooks a tenant has."""
POLL_S = 0.5
"""How long an event waits at most, once queued, while the courier has a lane free."""
UNAVAILABLE_PAUSE_S = 2.0
DRAIN_SLACK_S = 5.0
"""Beyond a turn and a request, when told to stop: recording the last answers."""


class Courier:
    """One courier."""

    def __init__(self, pool: TenantConnectionPool, sender: Sender, settings: Settings) -> None:
        self._pool = pool
        self._runner = LaneRunner(pool, sender, settings)
        self._lanes_max = settings.webhook_lanes
        self._drain_s = TURN_S + settings.webhook_timeout_s + DRAIN_SLACK_S
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Future[None]) -> None:
        """Serve lanes until ``stop``; turns under way may end."""
        log.info("courier ready", lanes=self._lanes_max)
        try:
            while not stop.done():
                pause_s = POLL_S
                try:
                    await self._begin_due()
                except UnavailableError as error:
                    log.warning("no lanes leased", error=str(error), retry_in_s=UNAVAILABLE_PAUSE_S)
                    pause_s = UNAVAILABLE_PAUSE_S
                await self._wait(stop, pause_s)
        finally:
            await self._drain()

    async def _begin_due(self) -> None:
        free = self._lanes_max - len(self._running)
        lease_id = new_lease()
        async with self._pool.courier() as tx:
            METRICS.webhook_queue_age.set(await tx.fetchval(queries.QUEUE_AGE))
            if not free:
                return
            rows = await tx.fetch(queries.CLAIM_LANES, free, LANES_PER_TENANT, lease_id, self._runner.lease_s)
        for row in rows:
            lane = Lane(TenantId(str(row["tenant_id"])), str(row["webhook_id"]), lease_id)
            task = asyncio.create_task(self._runner.serve(lane), name=f"lane {lane.webhook_id}")
            self._running.add(task)
            task.add_done_callback(partial(self._on_turn_done, lane))

    async def _wait(self, stop: asyncio.Future[None], pause_s: float) -> None:
        """A while; less if ``stop`` comes, or a turn ends that there was no room beside."""
        full = len(self._running) >= self._lanes_max
        ends: set[asyncio.Future[Any]] = {stop, *(self._running if full else ())}
        await asyncio.wait(ends, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)

    def _on_turn_done(self, lane: Lane, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        named = {"tenant": lane.tenant_id, "webhook": lane.webhook_id}
        if isinstance(error, NotFoundError):
            log.info("turn ended", **named, reason=str(error))  # the tenant is being erased
        elif isinstance(error, UnavailableError):
            log.warning("turn given up", **named, error=str(error))
        else:
            # Whatever one webhook meets ends its turn, never the courier with everyone else's: its lease holds it off.
            log.error("turn failed", **named, error=repr(error), exc_info=error)

    async def _drain(self) -> None:
        if not self._running:
            return
        _, late = await asyncio.wait(set(self._running), timeout=self._drain_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)


async def run(settings: Settings) -> None:
    """A courier process, until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: the login could bypass row-level security, or a file of the settings cannot be read.
        UnavailableError: Postgres did not answer at the start.
    """
    stop = stop_on_signals()
    pool = await TenantConnectionPool.open(settings)
    try:
        async with Sender(settings) as sender:
            await Courier(pool, sender, settings).run(stop)
    finally:
        await pool.close()
