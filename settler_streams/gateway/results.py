"""Results as server-sent events: each finished job of the tenant, in the order of the log, without end.

The id of an event is its offset in the log, so ``Last-Event-ID`` resumes exactly there; delivery is at least once over
reconnections. A message that has an id and no data (the first one, and every heartbeat) says how far the log was read.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiokafka
import msgspec
import structlog
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import InvalidRequestError, RecordError, UnavailableError
from settler_streams.events import JobFinished, TenantStatus, decode
from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.operations import gateway_of, principal_of
from settler_streams.gateway.problems import unavailable
from settler_streams.ids import TenantId, partition_of
from settler_streams.services import Principal
from settler_streams.services import Scope as KeyScope
from settler_streams.topology import full_name, load_topology

log = structlog.get_logger(__name__)

TOPIC = "job-results"
STREAMS_MAX, STREAMS_PER_TENANT_MAX = 200, 8
"""Open streams of a gateway, and of one tenant: each has a consumer of its own, about 100 KiB."""
HEARTBEAT_S = 10.0
"""Proxies end a silent connection after 30 to 60 s. As often, the key of a stream is looked up again."""
POLL_MS = 500
"""Longest wait of one poll, and so the longest until a stream notices that the gateway drains."""
OPEN_DEADLINE_S = 10.0
EVENT = "job.finished"


async def results(request: Request) -> Response:
    """GET /v1/results: from ``Last-Event-ID``, else from ``since`` (a time, or ``beginning``), else from now."""
    gateway, principal = gateway_of(request), principal_of(request)
    start = _start(request)
    if sum(gateway.streams.values()) >= STREAMS_MAX:
        return unavailable("this gateway serves as many event streams as it can")
    if gateway.streams.get(principal.tenant_id, 0) >= STREAMS_PER_TENANT_MAX:
        return unavailable(f"a tenant may open {STREAMS_PER_TENANT_MAX} event streams at a time")
    return ResultStream(gateway, principal, start)


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Start = int | dt.datetime | None
"""The next offset, a time, or None for now."""


def _start(request: Request) -> Start:
    last = request.headers.get("last-event-id")
    if last is not None:
        if not re.fullmatch(r"-1|[0-9]{1,18}", last):
            raise InvalidRequestError("Last-Event-ID: as an event of this stream gave it")
        return int(last) + 1
    since = request.query_params.get("since")
    if since is None:
        return None
    if since == "beginning":
        return 0
    try:
        at = dt.datetime.fromisoformat(since)
    except ValueError as error:
        raise InvalidRequestError("since: an RFC 3339 time or `beginning`") from error
    if at.tzinfo is None:
        raise InvalidRequestError("since: a time with its offset, such as 2026-01-01T00:00:00Z")
    if at < _EPOCH:
        return 0  # before the first record that there can be
    return at


class ResultStream(Response):
    """The response: ends when the client goes, the gateway drains, Kafka is lost, or the tenant is deleted or erased.

    It ends, too, when its key is no longer in force, may no longer read jobs, or cannot be looked up: no result is sent
    that was read from Kafka more than :data:`HEARTBEAT_S` after the key was last looked up.
    """

    def __init__(self, gateway: Gateway, principal: Principal, start: Start) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._gateway = gateway
        self._principal = principal
        self._tenant_id = principal.tenant_id
        self._start = start
        self._beat_s = time.monotonic()  # the key was found to hold just before
        count = load_topology().partitions(TOPIC)
        topic = full_name(gateway.settings.deployment, TOPIC)
        self._tp = TopicPartition(topic, partition_of(principal.root_id, count))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream. A failure before the first byte is a problem document; a later one ends the stream."""
        with _counted(self._gateway.streams, self._tenant_id):
            try:
                async with self._consumer() as consumer:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    gone = asyncio.create_task(_disconnected(receive))
                    try:
                        await self._stream(consumer, send, gone)
                    finally:
                        gone.cancel()
            except UnavailableError as error:
                await unavailable(str(error))(scope, receive, send)

    async def _stream(self, consumer: aiokafka.AIOKafkaConsumer, send: Send, gone: asyncio.Task[None]) -> None:
        text = await self._position(consumer)
        while True:
            removed = self._removed()
            if text and not removed:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            if gone.done() or removed or self._gateway.draining.is_set():
                break
            try:
                batches: dict[TopicPartition, list[Any]] = await consumer.getmany(self._tp, timeout_ms=POLL_MS)
                text = "".join(self._message(record) for records in batches.values() for record in records)
                if time.monotonic() - self._beat_s > HEARTBEAT_S:
                    self._beat_s = time.monotonic()
                    if not await self._gateway.api_keys.holds(self._principal, KeyScope.JOBS_READ):
                        break
                    text += await self._position(consumer)
            # A stream whose key cannot be looked up ends, as a request is refused then: else a revoked key would be
            # good for as long as the database is away. Clients resume with Last-Event-ID and miss nothing.
            except (KafkaError, UnavailableError) as error:
                log.warning("event stream ended", tenant=self._tenant_id, error=repr(error))
                break
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _removed(self) -> bool:
        """Whether the tenant is deleted or erased, as last heard: sooner than the key is looked up again."""
        directory = self._gateway.directory
        known = directory.get(self._tenant_id)
        deleted = known is not None and known.status is TenantStatus.DELETED
        return deleted or directory.is_erased(self._tenant_id)

    async def _position(self, consumer: aiokafka.AIOKafkaConsumer) -> str:
        """A message without data: everything up to this id has been read."""
        return f"id: {await consumer.position(self._tp) - 1}\n\n"

    def _message(self, record: Any) -> str:
        """One event; nothing for a record of another tenant that shares the partition."""
        try:
            event = decode(record.value)
        except RecordError as error:
            log.error("record passed over", topic=TOPIC, offset=record.offset, reason=error.reason)  # noqa: TRY400
            return ""
        if event.tenantid != self._tenant_id or not isinstance(event.data, JobFinished):
            return ""
        return f"id: {record.offset}\nevent: {EVENT}\ndata: {msgspec.json.encode(event.data).decode()}\n\n"

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[aiokafka.AIOKafkaConsumer]:
        consumer = Cluster.of(self._gateway.settings).consumer(
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # an offset that has expired goes on with the oldest that is kept
            fetch_max_wait_ms=POLL_MS,
        )
        try:
            try:
                async with asyncio.timeout(OPEN_DEADLINE_S):
                    await consumer.start()
                    consumer.assign([self._tp])
                    await self._seek(consumer)
            except (KafkaError, TimeoutError, OSError) as error:
                raise UnavailableError(f"the results cannot be read now: {error!r}") from error
            yield consumer
        finally:
            await consumer.stop()

    async def _seek(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        end = (await consumer.end_offsets([self._tp]))[self._tp]
        match self._start:
            case dt.datetime() as at:
                found = (await consumer.offsets_for_times({self._tp: int(at.timestamp() * 1000)}))[self._tp]
                consumer.seek(self._tp, end if found is None else found.offset)
            case int(offset):
                first = (await consumer.beginning_offsets([self._tp]))[self._tp]
                consumer.seek(self._tp, min(max(offset, first), end))
            case _:
                consumer.seek(self._tp, end)


@contextmanager
def _counted(streams: dict[str, int], tenant_id: TenantId) -> Iterator[None]:
    """Count an open stream while it is open."""
    streams[tenant_id] = streams.get(tenant_id, 0) + 1
    try:
        yield
    finally:
        left = streams.pop(tenant_id) - 1
        if left:
            streams[tenant_id] = left


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
