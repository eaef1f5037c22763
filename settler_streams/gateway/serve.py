"""Serving: the gateway on a socket, until it is told to stop; then it drains."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import structlog
import uvicorn

from settler_streams.errors import ConfigurationError
from settler_streams.gateway.app import create_app
from settler_streams.gateway.connections import BoundedConnection
from settler_streams.gateway.gateway import Gateway
from settler_streams.settings import Settings

log = structlog.get_logger(__name__)

DRAIN_S = 2.0
"""How long a gateway that was told to stop still takes requests, saying that it is not ready: load balancers look every
second or so. The first signal begins it, a second one ends it."""
SHUTDOWN_DEADLINE_S = 10
"""Longest wait for requests under way, after that."""
CONNECTIONS_MAX = 1_000
"""Open connections; one more is answered 503."""
KEEP_ALIVE_S = 30
BACKLOG = 512


async def serve(
    settings: Settings,
    *,
    listener: socket.socket | None = None,
    stop: asyncio.Event | None = None,
    drain_s: float = DRAIN_S,
) -> None:
    """Serve until SIGTERM, SIGINT or ``stop``; returns when every request has ended.

    ``listener`` is a bound socket; without one the settings' host and port are bound.

    Raises:
        ConfigurationError: the address cannot be bound.
        UnavailableError: Postgres or Kafka did not answer in time.
    """
    listener = listener or bind(settings.gateway_host, settings.gateway_port)
    try:
        async with Gateway.open(settings) as gateway:
            config = uvicorn.Config(
                create_app(gateway),
                http=BoundedConnection,
                ws="none",  # no operation speaks it, and an upgraded connection would leave the bounds
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS_MAX,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_DEADLINE_S,
            )
            server = _Server(config, gateway, drain_s)
            log.info("gateway ready", address="{}:{}".format(*listener.getsockname()[:2]))
            stopping = asyncio.create_task(_drain_on(stop, server)) if stop is not None else None
            try:
                await server.serve(sockets=[listener])
            finally:
                if stopping is not None:
                    stopping.cancel()
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigurationError: the address is taken or not this machine's.
    """
    # The protocol is named because asyncio sets TCP_NODELAY only where it is; without it every answer on a connection
    # that is kept alive waits 40 ms for a delayed acknowledgement.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains before it closes its socket."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, drain_s: float) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_s = drain_s
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """The first signal drains, a second one ends at once."""
        if self._gateway.draining.is_set():
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Say not ready, end the event streams, and stop listening a moment later."""
        if self._gateway.draining.is_set():
            return
        log.info("gateway draining", for_s=self._drain_s)
        self._gateway.draining.set()
        self._loop.call_later(self._drain_s, setattr, self, "should_exit", True)


async def _drain_on(stop: asyncio.Event, server: _Server) -> None:
    await stop.wait()
    server.drain()
