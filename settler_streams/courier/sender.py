"""One request to one endpoint, and nothing that the endpoint could do with it beyond answering.

The host's name is resolved here, each address is checked, and the connection goes to an address that was checked: what
the name resolves to a moment later does not matter. No redirect is followed and no proxy of the environment is asked.
What an endpoint may cost is bounded: time, connections, bytes that are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpcore

from settler_streams import __version__
from settler_streams.errors import ConfigurationError
from settler_streams.events.envelope import CONTENT_TYPE
from settler_streams.services.webhooks import Destination, Rules
from settler_streams.settings import Settings

if TYPE_CHECKING:
    from settler_streams.services.webhooks.destinations import Address

IN_FLIGHT_PER_LANE = 4
"""Requests to one webhook at a time: an endpoint of 100 ms then takes 40 events a second."""
KEPT_CONNECTIONS_MAX, KEPT_S = 64, 15.0
"""Idle connections that wait for the next event: a handshake costs an endpoint more than a request."""
ANSWER_BYTES_MAX = 64 * 1024
"""Read of an answer's body, so that the connection can be kept; a longer one closes it."""
ADDRESSES_MAX = 4
"""Addresses of one name that are tried, all within the one timeout."""

_HEADERS = {"content-type": CONTENT_TYPE, "user-agent": f"settler-webhooks/{__version__}", "accept": "*/*"}
_GONE = 410


class Outcome(enum.StrEnum):
    """How an attempt ended; the tenant sees it, so it says nothing about the network that we are in."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    GONE = "gone"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    FORBIDDEN = "forbidden"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of an attempt. ``status`` is None when none arrived; header names are in lower case."""

    outcome: Outcome
    seconds: float
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class ForbiddenAddressError(OSError):
    """The host has no address that webhooks may go to."""


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the rules allow, and to no others."""

    def __init__(self, rules: Rules, *, threads_max: int) -> None:
        self._rules = rules
        self._inner = httpcore.AnyIOBackend()
        # Of its own, and with a thread per request: a name server that never answers must not hold up other names.
        self._resolver = ThreadPoolExecutor(threads_max, thread_name_prefix="resolve")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first allowed address of ``host`` that answers.

        Raises:
            ForbiddenAddressError: it has none.
            OSError, httpcore.ConnectError: the name does not resolve, or no address answers.
        """
        found = await self._addresses(host, port)
        allowed = [address for address in found if self._rules.allows(address)][:ADDRESSES_MAX]
        if not allowed:
            raise ForbiddenAddressError(f"{host} has no address that a webhook may go to")
        each_s = None if timeout is None else timeout / len(allowed)
        for address in allowed[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):  # the next one may answer
                return await self._inner.connect_tcp(str(address), port, each_s, local_address, socket_options)
        return await self._inner.connect_tcp(str(allowed[-1]), port, each_s, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> list[Address]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._resolver, _resolve, host, port)
        return [ipaddress.ip_address(text) for text in dict.fromkeys(found)]

    def close(self) -> None:
        """Let its threads end; one that still waits for a name server is not waited for."""
        self._resolver.shutdown(wait=False, cancel_futures=True)


class Sender:
    """Sends signed events. One per process; use it as a context manager."""

    def __init__(self, settings: Settings) -> None:
        in_flight_max = settings.webhook_lanes * IN_FLIGHT_PER_LANE
        self._timeout_s = float(settings.webhook_timeout_s)
        self._backend = GuardedBackend(Rules.of(settings), threads_max=in_flight_max)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=_trust(settings),
            max_connections=in_flight_max,
            max_keepalive_connections=KEPT_CONNECTIONS_MAX,
            keepalive_expiry=KEPT_S,
            network_backend=self._backend,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()
        self._backend.close()

    async def send(self, destination: Destination, headers: Mapping[str, str], body: bytes) -> Answer:
        """Post ``body``; returns within the timeout, whatever the endpoint does. Never raises for what it does."""
        began_s = time.monotonic()
        answered: tuple[int, dict[str, str]] | None = None
        failure = Outcome.TIMEOUT
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._pool.stream(
                    "POST",
                    _url(destination),
                    headers=[*{"host": destination.authority, **_HEADERS, **headers}.items()],
                    content=body,
                    extensions={"timeout": {"connect": self._timeout_s}},
                ) as response:
                    answered = response.status, _readable(response.headers)
                    await _drain(response)
        except ForbiddenAddressError:
            failure = Outcome.FORBIDDEN
        except TimeoutError:
            failure = Outcome.TIMEOUT
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            failure = Outcome.UNREACHABLE
        seconds = time.monotonic() - began_s
        if answered is None:
            return Answer(failure, seconds)
        # An answer is its status; one whose body does not end has only cost the connection.
        status, received = answered
        return Answer(_outcome_of(status), seconds, status, received)


def _outcome_of(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome.DELIVERED
    return Outcome.GONE if status == _GONE else Outcome.REFUSED


async def _drain(response: httpcore.Response) -> None:
    read = 0
    async for part in response.aiter_stream():
        read += len(part)
        if read > ANSWER_BYTES_MAX:
            return


def _readable(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def _url(destination: Destination) -> httpcore.URL:
    return httpcore.URL(
        scheme=destination.scheme.encode(),
        host=destination.host.encode(),
        port=destination.port,
        target=destination.target.encode(),
    )


def _trust(settings: Settings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.webhook_ca_file)
    except OSError as error:
        raise ConfigurationError(f"SETTLER_WEBHOOK_CA_FILE: {settings.webhook_ca_file}: {error}") from error


def _resolve(host: str, port: int) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except UnicodeError as error:
        raise OSError(f"{host!r} is no name that can be looked up") from error
