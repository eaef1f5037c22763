"""What operators ask a gateway: does it live, may it have traffic, what are its numbers."""

from __future__ import annotations

import asyncio
import ipaddress

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from settler_streams.errors import UnavailableError
from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.operations import gateway_of
from settler_streams.gateway.problems import problem
from settler_streams.services import queries

PROBE_DEADLINE_S = 1.0
"""A load balancer asks every few seconds and gives up after a few."""


async def livez(_request: Request) -> Response:
    """200 while the process answers."""
    return JSONResponse({"status": "live"})


async def readyz(request: Request) -> Response:
    """200 when a request would be served; 503 while draining, or naming what is missing. Valkey is not needed."""
    gateway = gateway_of(request)
    missing = ["draining"] if gateway.draining.is_set() else await _missing(gateway)
    if missing:
        return JSONResponse({"status": "not-ready", "missing": missing}, 503)
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Prometheus' text format, for scrapers on private addresses alone: the labels name tenants."""
    forwarded = {"forwarded", "x-forwarded-for"} & set(request.headers)
    if forwarded or request.client is None or not _private(request.client.host):
        return problem(404, "Not Found")
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _missing(gateway: Gateway) -> list[str]:
    feeds = (gateway.directory.feed, gateway.flags.feed, gateway.decisions.feed)
    missing = [f"feed of {feed.topic}" for feed in feeds if feed.stale]
    if not gateway.relay.running:
        missing.append("outbox relay")
    if not await _database_answers(gateway):
        missing.append("database")
    return missing


async def _database_answers(gateway: Gateway) -> bool:
    """One question at a time, whoever asks: no key is needed for it, and the pool's connections are for tenants."""
    if gateway.database_probe is None or gateway.database_probe.done():
        gateway.database_probe = asyncio.create_task(_probe(gateway))
    return await asyncio.shield(gateway.database_probe)  # who gives up must not end it for the others


async def _probe(gateway: Gateway) -> bool:
    try:
        async with asyncio.timeout(PROBE_DEADLINE_S), gateway.pool.platform() as tx:
            await tx.fetchval(queries.ANSWERS)
    except (UnavailableError, TimeoutError):
        return False
    return True


def _private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False
