"""What every request passes before its route: observation, bounds, its tenant, its rate limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.adapters.valkey.rate_limit import BURST_MAX, RATE_MAX, Limit, RateVerdict
from settler_streams.core.quotas import Limits
from settler_streams.errors import UnavailableError
from settler_streams.events import TenantStatus
from settler_streams.gateway.gateway import Gateway
from settler_streams.gateway.problems import problem, quota_exceeded, unauthenticated, unavailable
from settler_streams.ids import PLATFORM
from settler_streams.services import AuthenticationError, Principal

log = structlog.get_logger(__name__)

BODY_BYTES_MAX = 1024 * 1024
"""What the topic of job requests takes; larger record sets come as files."""
REQUEST_DEADLINE_S = 30.0
"""From the first byte to the last of everything but an event stream; the slowest wait inside is Kafka's, 20 s."""
HTTP_REQUESTS_PER_JOB = 10
"""The http policy is the tenant's job rate times this: room to ask after each job without polling without bound."""
HTTP_POLICY = "http"
NEVER_RETRY_MS = 60_000
"""Told to a tenant whose rate is zero, instead of `never`."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
TENANT_HEADER = "x-tenant-id"
UNBOUNDED_PATHS = frozenset({"/v1/results"})
OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics", "/openapi.json"})
"""Paths that need no key."""

RouteOf = Callable[[Scope], str]


class ObservationMiddleware:
    """Counts and times every request; an exception that nobody turned into an answer is logged here, once."""

    def __init__(self, app: ASGIApp, route_of: RouteOf) -> None:
        self._app = app
        self._route_of = route_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        started_s, status = time.monotonic(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            log.exception("request failed", method=scope["method"], route=self._route_of(scope))
            raise
        finally:
            principal = scope["state"].get("principal")
            tenant = principal.tenant_id if principal is not None else PLATFORM
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            route = self._route_of(scope)
            seconds = None if scope["path"] in UNBOUNDED_PATHS else time.monotonic() - started_s
            METRICS.http_request(method, route, status, seconds, tenant)


class BoundsMiddleware:
    """A body has at most :data:`BODY_BYTES_MAX`, a request lasts at most :data:`REQUEST_DEADLINE_S`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in UNBOUNDED_PATHS:
            await self._app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(REQUEST_DEADLINE_S):
                body = await _read_body(scope, receive)
                if body is None:
                    refusal = problem(413, f"a body has at most {BODY_BYTES_MAX} bytes")
                    await refusal(scope, receive, noted)
                    return
                await self._app(scope, _replayed(body, receive), noted)
        except TimeoutError:
            if begun:
                raise
            await unavailable(f"the request took longer than {REQUEST_DEADLINE_S:.0f} s")(scope, receive, send)


class TenantMiddleware:
    """The tenant of a request is whom its API key speaks for, and nothing else that the client says."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            principal = await self._gateway.api_keys.authenticate(_bearer(headers))
        except AuthenticationError:
            await unauthenticated()(scope, receive, send)
            return
        except UnavailableError as error:
            await unavailable(str(error))(scope, receive, send)
            return
        named = headers.get(TENANT_HEADER)
        if named is not None and named != principal.tenant_id:
            await problem(403, "the API key speaks for another tenant than the header names")(scope, receive, send)
            return
        scope["state"]["principal"] = principal
        if scope["method"] not in ("GET", "HEAD") and not self._active(principal):
            await problem(403, "the tenant or one of its parents is suspended")(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _active(self, principal: Principal) -> bool:
        """Whether the tenant, as stored, and its parents, as last heard of, may change anything."""
        directory = self._gateway.directory
        parents = (directory.get(member) for member in directory.chain(principal.tenant_id)[1:])
        return principal.status is TenantStatus.ACTIVE and all(
            parent is None or parent.status is TenantStatus.ACTIVE for parent in parents
        )


class QuotaMiddleware:
    """The http policy: a token bucket per tenant and parent. An Enterprise tenant passes."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        principal = scope.get("state", {}).get("principal")
        limits = self._limits(principal) if principal is not None else ()
        if not limits:
            await self._app(scope, receive, send)
            return
        verdict = await self._gateway.limiter.take(principal.root_id, limits)

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                _label(MutableHeaders(scope=message), verdict)
            await send(message)

        if verdict.allowed:
            await self._app(scope, receive, labelled)
            return
        METRICS.rate_limited(principal.tenant_id)
        wait_ms = NEVER_RETRY_MS if verdict.retry_after_ms is None else verdict.retry_after_ms
        told = f"more than {verdict.limit.rate_per_minute} requests a minute"
        await quota_exceeded(told, HTTP_POLICY, wait_ms)(scope, receive, labelled)

    def _limits(self, principal: Principal) -> tuple[Limit, ...]:
        """The limit of the tenant and of each parent; none for Enterprise."""
        gateway = self._gateway
        tier = gateway.tiers[principal.tier]
        if tier.enterprise:
            return ()
        limits = []
        for member in gateway.directory.chain(principal.tenant_id):
            tenant = gateway.directory.get(member)
            if tenant is None:  # created a moment ago
                rate, burst = tier.rate_limit, tier.burst
            else:
                policy = Limits.of(tenant, gateway.tiers).rate
                rate, burst = policy.rate_per_minute, policy.burst
            limits.append(
                Limit(
                    member,
                    min(RATE_MAX, rate * HTTP_REQUESTS_PER_JOB),
                    min(BURST_MAX, burst * HTTP_REQUESTS_PER_JOB),
                )
            )
        return tuple(limits)


def _bearer(headers: Headers) -> str:
    """The key of ``Authorization: Bearer <key>``; empty, which no key is, for anything else."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _label(headers: MutableHeaders, verdict: RateVerdict) -> None:
    """RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers): quota per window, what remains."""
    remaining = f'"{HTTP_POLICY}";r={verdict.remaining}'
    if not verdict.allowed:
        wait_ms = NEVER_RETRY_MS if verdict.retry_after_ms is None else verdict.retry_after_ms
        remaining += f";t={-(-wait_ms // 1000)}"
    headers["RateLimit-Policy"] = f'"{HTTP_POLICY}";q={verdict.limit.rate_per_minute};w=60'
    headers["RateLimit"] = remaining


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body, or None when it is too large."""
    announced = Headers(scope=scope).get("content-length", "0")
    if not announced.isdigit() or int(announced) > BODY_BYTES_MAX:
        return None
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return bytes(body)
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
