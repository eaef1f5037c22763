"""What a test sees of Kafka, PostgreSQL and Valkey, whoever provides them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from settler_streams.settings import Settings


class Service(ABC):
    """One running service, which a test can also take away.

    It keeps its address and its data through ``stop`` and ``kill`` (Valkey keeps no data: it never stores any).
    """

    name: ClassVar[str]

    @abstractmethod
    def start(self) -> None:
        """Have it running and answering real clients; does nothing when it is."""

    @abstractmethod
    def stop(self) -> None:
        """End it in order."""

    @abstractmethod
    def kill(self) -> None:
        """End it at once, as a crash would."""

    @abstractmethod
    def pause(self) -> None:
        """Stop it from answering, its connections left open, as a machine that hangs."""

    @abstractmethod
    def resume(self) -> None:
        """Undo :meth:`pause`."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether its process lives."""


class Services(ABC):
    """The three services of one test session. None runs before a test asks for it.

    Attributes:
        settings: addresses and passwords of all three, valid before they are started and through restarts.
    """

    settings: Settings
    kafka: Service
    postgres: Service
    valkey: Service

    @abstractmethod
    def close(self) -> None:
        """Stop all and delete their data."""
