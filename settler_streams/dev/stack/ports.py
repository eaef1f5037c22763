"""Free TCP ports of the loopback interface that no outgoing connection takes by chance."""

from __future__ import annotations

import secrets
import socket
from typing import TYPE_CHECKING

from settler_streams.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Collection

RANGE = range(20_000, 30_000)
"""Below every system's ephemeral range: a client that reconnects to a stopped service on an ephemeral port can meet
itself there (TCP simultaneous open), and would then hold the port that the service needs."""

TRIES_MAX = 200
"""With nine of ten ports in the range taken, all tries fail once in a thousand million times."""


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now; a connection still in TIME_WAIT does not hinder one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port(taken: Collection[int] = ()) -> int:
    """A free port that is not in ``taken``. Another program can still take it first: a start has to look again.

    Raises:
        UnavailableError: no free port was found.
    """
    for _ in range(TRIES_MAX):
        port = secrets.choice(RANGE)
        if port not in taken and is_free(port):
            return port
    raise UnavailableError(f"no free port between {RANGE.start} and {RANGE.stop - 1} after {TRIES_MAX} tries")
