"""One turn of one webhook: what is due is sent, a few at a time, until nothing is due, something fails, or time is up.

Whoever holds the lane's lease sends alone. What came of an attempt is recorded after it: a courier that dies in between
leaves the delivery pending, and the next one sends it again under the same id.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.core.webhooks import backoff_s, lane_pause_s, retry_after_s, signed_headers
from settler_streams.courier.sender import IN_FLIGHT_PER_LANE, Answer, Outcome, Sender
from settler_streams.errors import ConfigurationError, InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.services import tenant_store
from settler_streams.services.webhooks import Destination, KeyRing, Rules, Sealed, queries
from settler_streams.services.webhooks.rows import changed, owner
from settler_streams.settings import Settings

if TYPE_CHECKING:
    import asyncpg

    from settler_streams.adapters.postgres.pool import Transaction

log = structlog.get_logger(__name__)

ACTOR = "courier"
TURN_S = 5.0
"""After this long no further request begins, and the lane goes to the end of the line."""
LEASE_SLACK_S = 30.0
"""Beyond a turn and a request: what Postgres may take to record the last answers. A courier that dies keeps a lane from
the others for as long as its lease."""
DELIVERED_DAYS, DEAD_DAYS = 7, 30
"""How long deliveries that ended are kept for whoever asks."""
TIDIED_MAX = 1_000
"""Ended deliveries that one turn deletes, in some milliseconds."""
VISITED_EVERY_S, TIDIED_EVERY_S = 86_400.0, 5.0
"""How long a lane is left alone that has nothing to send; the second while a turn has not tidied everything away."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A leased lane."""

    tenant_id: TenantId
    webhook_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class Parcel:
    """One delivery that is due."""

    event_id: str
    body: bytes
    attempts: int


@dataclass(frozen=True, slots=True)
class Round:
    """What a lane has to send now, and how."""

    destination: Destination
    secrets: tuple[bytes, ...] = field(repr=False)
    failures: int
    parcels: tuple[Parcel, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a round means to the lane: failures in a row, a pause in seconds, and whether the turn goes on."""

    failures: int
    pause_s: float
    goes_on: bool


class LaneRunner:
    """Serves leased lanes. It shares a pool and a sender with all of them."""

    def __init__(self, pool: TenantConnectionPool, sender: Sender, settings: Settings) -> None:
        self._pool = pool
        self._sender = sender
        self._rules = Rules.of(settings)
        self._keys = KeyRing(settings)
        self._retry_s = float(settings.webhook_retry_s)
        self.lease_s = TURN_S + settings.webhook_timeout_s + LEASE_SLACK_S

    async def serve(self, lane: Lane) -> None:
        """One turn of ``lane``.

        1. Read what is due, with the webhook's URL and secrets.
        2. Send it, a few at a time; one only while the endpoint fails.
        3. Record what came of each, in one transaction; from 1 until nothing is due, a round has failed, or time is up.
        4. Tidy up, compute when the lane is due again, and give the lease back.

        Raises:
            UnavailableError: Postgres failed. The lease ends by itself, and what was not recorded is sent again.
        """
        ends_s = time.monotonic() + TURN_S
        verdict: Verdict | None = None
        while verdict is None or (verdict.goes_on and time.monotonic() < ends_s):
            current = await self._read(lane, None if verdict is None else verdict.failures)
            if current is None:
                return  # removed, or leased to another: not ours to give back
            verdict = current if isinstance(current, Verdict) else await self._deliver(lane, current)
        await self._release(lane, verdict)

    async def _read(self, lane: Lane, failures: int | None) -> Round | Verdict | None:
        """What there is to send; a verdict where nothing can be; None where the lane is not ours any more.

        ``failures`` are those in a row as of the turn's last round; the row has them as of the last turn.
        """
        async with self._pool.tenant(lane.tenant_id) as tx:
            row = await tx.fetchrow(queries.READ_LANE, lane.tenant_id, lane.webhook_id, lane.lease_id)
            if row is None:
                return None
            if failures is None:
                failures = int(row["failures"])
            try:
                destination = self._rules.destination(row["url"])
                secrets = await self._secrets(tx, lane, row)
            except (ConfigurationError, InvalidRequestError) as error:
                # The operator's to mend, for this webhook; the others are served meanwhile.
                log.error("webhook cannot be sent", **_named(lane), error=str(error))  # noqa: TRY400
                return Verdict(failures + 1, lane_pause_s(failures + 1), goes_on=False)
            due: list[asyncpg.Record] = []
            if row["status"] == "active":
                in_flight = 1 if failures else IN_FLIGHT_PER_LANE
                due = await tx.fetch(queries.READ_DUE, lane.tenant_id, lane.webhook_id, in_flight)
        if not due:
            return Verdict(failures, 0.0, goes_on=False)
        parcels = tuple(Parcel(str(d["event_id"]), d["body"].encode(), d["attempts"]) for d in due)
        return Round(destination, secrets, failures, parcels)

    async def _secrets(self, tx: Transaction, lane: Lane, row: asyncpg.Record) -> tuple[bytes, ...]:
        """The secrets that sign now, the newest first; what is stored under an older key is encrypted anew."""
        whose = owner(lane.tenant_id, lane.webhook_id)
        opened = []
        for prefix, reseal in (("", queries.RESEAL), ("previous_", queries.RESEAL_PREVIOUS)):
            sealed = Sealed(row[f"{prefix}secret_key_id"], row[f"{prefix}secret_encrypted"])
            if prefix and not row["previous_signs"]:
                continue
            opened.append(self._keys.open(sealed, whose))
            if sealed.key_id != self._keys.newest:
                fresh = self._keys.seal(opened[-1], whose)
                await tx.execute(reseal, lane.tenant_id, lane.webhook_id, sealed.blob, fresh.key_id, fresh.blob)
        return tuple(opened)

    async def _deliver(self, lane: Lane, current: Round) -> Verdict:
        answers = await asyncio.gather(*(self._send(current, parcel) for parcel in current.parcels))
        return await self._record(lane, current, answers)

    async def _send(self, current: Round, parcel: Parcel) -> Answer:
        signed = signed_headers(current.secrets, parcel.event_id, int(time.time()), parcel.body)
        answer = await self._sender.send(current.destination, signed, parcel.body)
        METRICS.webhook_attempts.labels(answer.outcome.value).inc()
        METRICS.webhook_attempt_seconds.observe(answer.seconds)
        return answer

    async def _record(self, lane: Lane, current: Round, answers: list[Answer]) -> Verdict:
        """Write what came of a round. An answer that another courier has recorded meanwhile changes nothing."""
        asked_s = max(retry_after_s(answer.headers, time.time()) if _failed(answer) else 0.0 for answer in answers)
        gone = any(answer.outcome is Outcome.GONE for answer in answers)
        delivered = dead = 0
        async with self._pool.tenant(lane.tenant_id) as tx:
            if gone:
                await self._disable(tx, lane)
            else:
                await tx.execute(queries.KEEP_WEBHOOK, lane.tenant_id, lane.webhook_id)
            for parcel, answer in zip(current.parcels, answers, strict=True):
                place = (lane.tenant_id, lane.webhook_id, parcel.event_id, answer.outcome.value, answer.status)
                if not _failed(answer):
                    delivered += bool(await tx.fetchval(queries.RECORD_DELIVERED, *place))
                    continue
                delay_s = backoff_s(parcel.attempts + 1, random.uniform(-1, 1), asked_s)  # noqa: S311
                status = await tx.fetchval(queries.RECORD_FAILURE, *place, delay_s, self._retry_s, parcel.attempts)
                dead += status == "dead"
            if gone:
                dead += len(await tx.fetch(queries.RECORD_GONE, lane.tenant_id, lane.webhook_id, Outcome.GONE.value))
            elif all(map(_failed, answers)):
                dead += len(await tx.fetch(queries.EXPIRE, lane.tenant_id, lane.webhook_id, self._retry_s))
        METRICS.webhook_deliveries.labels("delivered").inc(delivered)
        METRICS.webhook_deliveries.labels("dead").inc(dead)
        if not all(map(_failed, answers)):
            return Verdict(0, asked_s, goes_on=asked_s == 0 and not gone)
        log.info("webhook failed", **_named(lane), outcomes=[answer.outcome.value for answer in answers])
        failures = current.failures + 1
        return Verdict(failures, lane_pause_s(failures, asked_s), goes_on=False)

    async def _disable(self, tx: Transaction, lane: Lane) -> None:
        """The endpoint says that it is gone for good: nothing is sent or queued any more."""
        await tenant_store.hold(tx, lane.tenant_id)
        if not await tx.fetchval(queries.SET_STATUS, lane.tenant_id, lane.webhook_id, "disabled", "gone"):
            return  # removed meanwhile
        after = {"status": "disabled", "reason": "gone"}
        await changed(tx, lane.tenant_id, lane.webhook_id, "webhook.disabled", ACTOR, after=after)
        log.warning("webhook disabled: its endpoint is gone", **_named(lane))

    async def _release(self, lane: Lane, verdict: Verdict) -> None:
        tenant_id, webhook_id = lane.tenant_id, lane.webhook_id
        async with self._pool.tenant(tenant_id) as tx:
            # Webhooks before lanes and lanes before deliveries, as everywhere: two transactions that lock them in turn
            # would block each other.
            await tx.execute(queries.KEEP_WEBHOOK, tenant_id, webhook_id)
            await tx.execute(queries.FORGET_PREVIOUS, tenant_id, webhook_id)
            ours = await tx.fetchval(queries.LOCK_LANE, tenant_id, webhook_id, lane.lease_id)
            tidied = await tx.execute(
                queries.DELETE_ENDED, tenant_id, webhook_id, DELIVERED_DAYS, DEAD_DAYS, TIDIED_MAX
            )
            if ours:
                idle_s = TIDIED_EVERY_S if tidied == f"DELETE {TIDIED_MAX}" else VISITED_EVERY_S
                await tx.execute(queries.RELEASE_LANE, tenant_id, webhook_id, verdict.failures, verdict.pause_s, idle_s)


def new_lease() -> str:
    """A lease that no courier ever had."""
    return str(uuid.uuid4())


def _failed(answer: Answer) -> bool:
    return answer.outcome is not Outcome.DELIVERED


def _named(lane: Lane) -> dict[str, str]:
    return {"tenant": lane.tenant_id, "webhook": lane.webhook_id}
