"""The embedded stack with a broker that has one listener per client process, each advertised at a proxy's address.

A Kafka client follows the addresses that the broker advertises, so a proxy in front of the bootstrap address alone
would soon be passed by. Here whoever enters through a proxied listener is sent back to its own proxy, and to no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from settler_streams.dev.stack import EmbeddedStack, ports
from settler_streams.dev.stack.kafka import Kafka
from settler_streams.dev.stack.part import Part
from settler_streams.dev.stack.state import State

HOST = "127.0.0.1"


class Door(NamedTuple):
    """A listener: the port that the broker listens on, and that of the proxy that clients are sent to."""

    broker_port: int
    proxy_port: int


class ProxiedKafka(Kafka):
    """The node of the embedded stack with further listeners, by name."""

    doors: Mapping[str, Door] = {}

    def properties(self, data: Path) -> bytes:
        listeners, advertised, protocols = [], [], []
        for name, door in self.doors.items():
            label = name.upper().replace("-", "_")
            listeners.append(f",{label}://{HOST}:{door.broker_port}")
            advertised.append(f",{label}://{HOST}:{door.proxy_port}")
            protocols.append(f",{label}:PLAINTEXT")
        more = {
            "listeners=": listeners,
            "advertised.listeners=": advertised,
            "listener.security.protocol.map=": protocols,
        }
        lines = super().properties(data).decode().splitlines()
        for number, line in enumerate(lines):
            for start, additions in more.items():
                if line.startswith(start):
                    lines[number] = line + "".join(additions)
        # One listener serves one client here; and sessions shorter than the default minimum are allowed.
        lines += ["num.network.threads=1", "group.min.session.timeout.ms=1000"]
        return "\n".join([*lines, ""]).encode()


class ProxiedStack(EmbeddedStack):
    """Kafka with a door per name, PostgreSQL and Valkey; ports are chosen once and stay."""

    def __init__(self, state_dir: Path, names: list[str]) -> None:
        super().__init__(state_dir, environ={})
        taken: list[int] = []
        self.doors: dict[str, Door] = {}
        for name in names:
            pair = [ports.free_port(taken=taken), 0]
            pair[1] = ports.free_port(taken=[*taken, pair[0]])
            taken += pair
            self.doors[name] = Door(*pair)

    def _build(self, name: str, state: State) -> Part:  # type: ignore[override]
        if name != "kafka":
            return super()._build(name, state)  # type: ignore[arg-type]
        kafka = ProxiedKafka(
            self.state_dir / "kafka", state.ports["kafka"], state.ports["kafka-controller"], runtime=self._runtime
        )
        kafka.doors = self.doors
        return kafka
