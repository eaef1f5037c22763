"""A TCP proxy in the test's own loop that can refuse, reset, delay, throttle, and cut a reply at a chosen moment.

Every connection passes two pumps, one per direction. What they do is decided piece by piece by the proxy's present
:class:`Weather`, so a change takes effect on connections that are open.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

PIECE_BYTES = 64 * 1024
CONNECT_S_MAX = 5.0
"""Loopback connects in microseconds; a service that is stopped refuses at once, one that is frozen accepts."""


@dataclass(frozen=True)
class Weather:
    """How the network is. ``silent`` keeps connections open and passes nothing on, as a cable that was pulled."""

    refuses: bool = False
    silent: bool = False
    delay_s: float = 0.0
    bytes_per_s: int | None = None


CALM = Weather()
Trap = Callable[[int, bytes, bool], bool]
"""Looks at a connection's number, a piece, and its direction (``True``: from the client); says when to act."""


class Proxy:
    """Listens on ``port`` and passes everything on to ``target``."""

    def __init__(self, name: str, port: int, target: int, host: str = "127.0.0.1") -> None:
        self.name = name
        self.port = port
        self.counts: Counter[str] = Counter()
        self._target = target
        self._host = host
        self._weather = CALM
        self._changed = asyncio.Event()
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._trap: tuple[Trap, asyncio.Future[None]] | None = None

    async def start(self) -> None:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._accept, self._host, self.port, limit=PIECE_BYTES)

    async def stop(self) -> None:
        """Close every connection."""
        if self._server is not None:
            self._server.close()
        self.reset()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))

    def set(self, weather: Weather) -> None:
        """Change the weather, for open connections too."""
        self._weather = weather
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def reset(self) -> int:
        """Break every open connection with a TCP reset; returns how many there were."""
        links = list(self._links)
        for link in links:
            link.abort()
        self.counts["reset"] += len(links)
        return len(links)

    def cut_when(self, trap: Trap) -> asyncio.Future[None]:
        """Reset the one connection on which ``trap`` sees its moment, once; the piece at hand is not passed on.

        Returns:
            a future that is done when it has happened.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._trap = (trap, done)
        return done

    def disarm(self) -> None:
        """Forget the trap."""
        self._trap = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._weather.refuses:
            self.counts["refused"] += 1
            writer.transport.abort()
            return
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                back_reader, back_writer = await asyncio.open_connection(self._host, self._target, limit=PIECE_BYTES)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        link = _Link(writer, back_writer)
        self._links.add(link)
        pumps = [
            asyncio.create_task(self._pump(link, reader, back_writer, from_client=True)),
            asyncio.create_task(self._pump(link, back_reader, writer, from_client=False)),
        ]
        try:
            await asyncio.wait(pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            link.abort()
            self._links.discard(link)

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        try:
            while piece := await reader.read(PIECE_BYTES):
                await self._hold(len(piece), from_client=from_client)
                if self._springs(link, piece, from_client):
                    link.abort()
                    return
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:
            link.abort()  # one end was reset, as a process is that is killed with something unread: so is the other

    def _springs(self, link: _Link, piece: bytes, from_client: bool) -> bool:
        if self._trap is None:
            return False
        trap, done = self._trap
        if not trap(id(link), piece, from_client):
            return False
        self._trap = None
        self.counts["cut"] += 1
        if not done.done():
            done.set_result(None)
        return True

    async def _hold(self, size: int, *, from_client: bool) -> None:
        """What the weather does to one piece before it goes on."""
        while self._weather.silent:
            await self._changed.wait()
        wait_s = self._weather.delay_s
        if self._weather.bytes_per_s is not None:
            wait_s += size / self._weather.bytes_per_s
        if wait_s:
            self.counts["held"] += 1
            changed = self._changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await changed.wait()


class _Link:
    """The two ends of one connection."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._ends = (client, server)

    def abort(self) -> None:
        """Close both ends at once; what was not sent is lost."""
        for end in self._ends:
            end.transport.abort()


def postgres_commit(_link: int, piece: bytes, from_client: bool) -> bool:
    """A client's COMMIT on its way to PostgreSQL."""
    return from_client and piece.startswith(b"Q") and b"COMMIT" in piece[:32]


def postgres_commit_reply(_link: int, piece: bytes, from_client: bool) -> bool:
    """PostgreSQL's word that it has committed, on its way to the client."""
    # Ready (Z) follows, or first what the end of the transaction has set back (S): the search path.
    return not from_client and (b"COMMIT\0Z" in piece or b"COMMIT\0S" in piece)


def kafka_commit(_link: int, piece: bytes, from_client: bool) -> bool:
    """A producer's request to commit its transaction (EndTxn, key 26), on its way to the coordinator.

    Its last byte says whether to commit or to abort.
    """
    size = int.from_bytes(piece[:4])
    return from_client and piece[4:6] == b"\x00\x1a" and piece[3 + size : 4 + size] == b"\x01"


def kafka_commit_reply() -> Trap:
    """The coordinator's answer to such a request: what comes next on its connection."""
    asked: set[int] = set()

    def trap(link: int, piece: bytes, from_client: bool) -> bool:
        if kafka_commit(link, piece, from_client):
            asked.add(link)
        return not from_client and link in asked

    return trap
