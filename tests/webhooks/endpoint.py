"""An endpoint on this machine that answers as it is told to, or not at all, and checks signatures by itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

WAIT_S_MAX = 60.0

Answer = Callable[["Endpoint", asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Request:
    """What arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event_id(self) -> str:
        return self.headers["webhook-id"]

    def signed_with(self, secret: str) -> bool:
        """As the Standard Webhooks specification tells receivers to verify."""
        key = base64.b64decode(secret.split("_", 1)[1])
        content = b".".join([self.event_id.encode(), self.headers["webhook-timestamp"].encode(), self.body])
        expected = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
        pairs = [one.split(",", 1) for one in self.headers["webhook-signature"].split(" ")]
        return any(version == "v1" and hmac.compare_digest(given, expected) for version, given in pairs)


def status(code: int, **headers: str) -> Answer:
    """An answer with this status."""

    async def answer(_endpoint: Endpoint, writer: asyncio.StreamWriter) -> None:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([f"HTTP/1.1 {code} X", "content-length: 2", *lines, "", "ok"]).encode())
        await writer.drain()

    return answer


async def hang(endpoint: Endpoint, _writer: asyncio.StreamWriter) -> None:
    """No answer, until the endpoint is released."""
    await endpoint.released.wait()


async def cut(_endpoint: Endpoint, writer: asyncio.StreamWriter) -> None:
    """The connection ends instead of an answer."""
    writer.transport.abort()


async def endless(endpoint: Endpoint, writer: asyncio.StreamWriter) -> None:
    """A good answer whose body does not end."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        while not endpoint.released.is_set():
            writer.write(b"x" * 65536)
            await writer.drain()


@dataclass
class Endpoint:
    """Answers with the first of ``script``, then with ``otherwise``."""

    otherwise: Answer = field(default_factory=lambda: status(200))
    script: deque[Answer] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?to=us"

    async def received(self, count: int) -> list[Request]:
        """The first ``count`` requests, once they are here."""
        async with asyncio.timeout(WAIT_S_MAX):
            while len(self.requests) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.requests[:count]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (request := await _read(reader)) is not None:
                self.in_flight += 1
                self.in_flight_max = max(self.in_flight_max, self.in_flight)
                self.requests.append(request)
                self._changed.set()
                answer = self.script.popleft() if self.script else self.otherwise
                try:
                    await answer(self, writer)
                finally:
                    self.in_flight -= 1
                if answer in (hang, cut, endless):
                    return
        except ConnectionError:
            return
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    assert head[0].startswith("POST "), head[0]
    return Request(head[0].split(" ")[1], headers, await reader.readexactly(int(headers["content-length"])))


@contextlib.asynccontextmanager
async def listening(
    *script: Answer, otherwise: Answer | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Endpoint]:
    """An endpoint on a free port."""
    endpoint = Endpoint(script=deque(script))
    if otherwise is not None:
        endpoint.otherwise = otherwise
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0, ssl=tls)
    endpoint.port = server.sockets[0].getsockname()[1]
    try:
        yield endpoint
    finally:
        endpoint.released.set()
        server.close()
