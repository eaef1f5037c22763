"""The embedded stack: Kafka, PostgreSQL and Valkey started together, found again, and stopped together.

What the environment names (``DB_HOST``, ``REDIS_HOST``, ``KAFKA_BOOTSTRAP_SERVERS``) is used as it is and never started
or stopped; unless it names the stack's own services, as in a shell that has evaluated ``settler env``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import msgspec
from pydantic import SecretStr

from settler_streams.dev.stack import ports
from settler_streams.dev.stack.folders import make_folder
from settler_streams.dev.stack.jvm import Runtime
from settler_streams.dev.stack.kafka import Kafka
from settler_streams.dev.stack.part import HOST, Part
from settler_streams.dev.stack.postgres import SUPERUSER, Postgres
from settler_streams.dev.stack.state import State, StateFile, locked
from settler_streams.dev.stack.valkey import Valkey
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from contextlib import AbstractContextManager
    from types import TracebackType

    from settler_streams.dev.stack.process import ProcessRef

PartName = Literal["kafka", "postgres", "valkey"]
PARTS: tuple[PartName, ...] = ("kafka", "postgres", "valkey")

GIVEN_BY: dict[PartName, str] = {"kafka": "KAFKA_BOOTSTRAP_SERVERS", "postgres": "DB_HOST", "valkey": "REDIS_HOST"}
"""The environment variable that names an external service, which then takes the part's place."""

PORTS_OF: dict[PartName, tuple[str, ...]] = {
    "kafka": ("kafka", "kafka-controller"),
    "postgres": ("postgres",),
    "valkey": ("valkey",),
}
"""The ports that each part listens on, by the names that ``ports=`` and the state file use."""

SECRETS = ("postgres", "postgres-app", "valkey", "webhooks")
"""What a stack makes for itself: passwords of the superuser, the services' role and Valkey; the webhooks' key."""

LOCK_S_MAX = 900.0
"""Another start may be fetching 45 MB over a slow line; past a quarter of an hour it hangs."""

REUSE_S_MAX = 10.0
"""A service that runs answers in milliseconds; one that a debugger or the machine's load has held gets this long."""

PORT_TRIES_MAX = 3
"""Losing a port between choosing and binding it is one chance in thousands; three times in a row is another fault."""


class PartStatus(msgspec.Struct, frozen=True):
    """How one part is: ``silent`` means that its process lives and no client gets an answer."""

    name: PartName
    state: Literal["external", "running", "silent", "stopped"]
    address: str
    pid: int | None = None
    log: Path | None = None


class EmbeddedStack:
    """The services of one state directory.

    Every method may be called from any process: a lock file keeps two of them apart, and whoever comes later finds what
    runs. Processes stay up when this object, or its process, goes; ``with`` stops them at the end of the block.

    Args:
        state_dir: holds all data, logs and the state file with the passwords (mode 0600). Created when missing.
        environ: where settings and external services are read from; by default this process's environment.
        ports: fixed ports by name (``kafka``, ``kafka-controller``, ``postgres``, ``valkey``); others are free ones,
            kept from one start to the next as long as nobody else takes them.
        runtime: the Java runtime; by default one that caches in the user's cache directory.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        environ: Mapping[str, str] | None = None,
        ports: Mapping[str, int] | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.state_dir = Path(os.path.abspath(state_dir))  # noqa: PTH100 - resolve() would follow links
        environ = os.environ if environ is None else environ
        self._base = Settings.from_environment(environ)
        self._ports = dict(ports or {})
        if unknown := self._ports.keys() - {port for names in PORTS_OF.values() for port in names}:
            raise ConfigurationError(f"no part has a port named {', '.join(sorted(unknown))}")
        self._runtime = runtime or Runtime()
        self._file = StateFile(self.state_dir / "state.json")
        named = [name for name in PARTS if environ.get(GIVEN_BY[name])]
        self.external: frozenset[PartName] = frozenset(name for name in named if not self._is_own(name))
        self._parts: dict[PartName, Part] = {}
        self._mutex = threading.Lock()

    def up(self, parts: Collection[PartName] = PARTS) -> Settings:
        """Have these parts running and answering, and the database created; start only what is not running yet.

        On any failure, what this call has started is stopped again.

        Returns:
            settings with the address and password of every part, started or not.

        Raises:
            ConfigurationError: the ``embedded`` extra is missing, or a fixed port belongs to another program.
            UnavailableError: a part did not become ready in time, or another start holds the lock.
        """
        make_folder(self.state_dir, 0o711 if os.geteuid() == 0 else 0o700)
        with self._locked():
            state = self._load()
            self._file.save(state)
            wanted = [name for name in PARTS if name in parts and name not in self.external]
            found = {name for name in wanted if self._parts[name].running}
            pool = ThreadPoolExecutor(len(PARTS), thread_name_prefix="stack")
            try:
                for done in [pool.submit(self._bring_up, name, state) for name in wanted]:
                    done.result()
            except BaseException:
                fresh = [name for name in wanted if name not in found]
                for name in fresh:
                    self._parts[name].kill()  # so that a thread that waits for it to be ready gives up at once
                pool.shutdown(cancel_futures=True)
                for name in fresh:
                    self._parts[name].stop()
                    state.processes.pop(name, None)
                self._file.save(state)
                raise
            finally:
                pool.shutdown()
            return self._settings(state)

    def down(self) -> None:
        """Stop every part that runs, each within its own deadline and then by force; leftovers of a crash too."""
        if not self.state_dir.is_dir():
            return
        with self._locked():
            state = self._load()
            self._each(self._take_down)
            state.processes.clear()
            self._file.save(state)

    def destroy(self) -> None:
        """Stop everything and delete all of its data, the state directory included."""
        if not self.state_dir.is_dir():
            return
        self.down()
        for part in self._parts.values():
            shutil.rmtree(part.home, ignore_errors=not part.home.exists())
        shutil.rmtree(self.state_dir)

    def status(self) -> list[PartStatus]:
        """How each part is now. Takes no lock, so that it also answers while another process starts the stack."""
        self._load()
        return [self._status(name) for name in PARTS]

    def part(self, name: PartName) -> Part:
        """The handle of one part, to stop or kill it alone; only after :meth:`up`, which also starts it again.

        Raises:
            ConfigurationError: the part is external, or the stack has not been brought up by this object.
        """
        if name not in self._parts:
            raise ConfigurationError(f"{name} is external or not up, so it cannot be handled here")
        return self._parts[name]

    @property
    def settings(self) -> Settings:
        """The settings as :meth:`up` gives them, from what is stored; the ports mean something once it has run."""
        return self._settings(self._load())

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _locked(self) -> AbstractContextManager[None]:
        return locked(self.state_dir / "lock", deadline_s=LOCK_S_MAX)

    def _load(self) -> State:
        """The stored state, completed with passwords and ports; and a handle for each part that is ours."""
        state = self._file.load()
        for secret in SECRETS:
            state.secret(secret)
        for name in PARTS:
            if name in self.external:
                continue
            ref = state.processes.get(name)
            if name in self._parts and self._parts[name].running:
                continue
            if ref is None or ref.find() is None:
                self._choose_ports(name, state)
            built = self._build(name, state)
            if name not in self._parts or self._parts[name].ports != built.ports:
                self._parts[name] = built  # else the handle that a caller may hold stays the one in use
            if ref is not None:
                self._parts[name].adopt(ref)
        return state

    def _choose_ports(self, name: PartName, state: State) -> None:
        """Keep a stopped part's ports where possible: fixed ones always, others while nobody else has them."""
        for port_name in PORTS_OF[name]:
            stored = state.ports.get(port_name)
            if fixed := self._ports.get(port_name):
                state.ports[port_name] = fixed
            elif stored is None or not ports.is_free(stored):
                state.ports[port_name] = ports.free_port(taken=state.ports.values())

    def _build(self, name: PartName, state: State) -> Part:
        home = self.state_dir / name
        if name == "kafka":
            return Kafka(home, state.ports["kafka"], state.ports["kafka-controller"], runtime=self._runtime)
        if name == "postgres":
            return Postgres(home, state.ports["postgres"], state.secret("postgres"))
        return Valkey(home, state.ports["valkey"], state.secret("valkey"))

    def _bring_up(self, name: PartName, state: State) -> None:
        part = self._parts[name]
        if part.running:
            try:
                part.wait_ready(REUSE_S_MAX)
            except UnavailableError:
                part.stop()
        if not part.running:
            self._start(name, state)
        started = self._parts[name]
        if isinstance(started, Postgres):
            started.create_database(self._base.db_name)

    def _start(self, name: PartName, state: State) -> None:
        for tries_left in reversed(range(PORT_TRIES_MAX)):
            part = self._parts[name]
            part.end_leftovers()
            self._refuse_taken_fixed_ports(name)
            self._record(name, part.start(), state)
            try:
                part.wait_ready()
            except UnavailableError:
                part.stop()
                if not tries_left or all(ports.is_free(state.ports[port]) for port in PORTS_OF[name]):
                    raise
                self._choose_ports(name, state)  # somebody else took a port since it was chosen
                self._parts[name] = self._build(name, state)
            else:
                return

    def _refuse_taken_fixed_ports(self, name: PartName) -> None:
        for port_name in PORTS_OF[name]:
            fixed = self._ports.get(port_name)
            if fixed is not None and not ports.is_free(fixed):
                raise ConfigurationError(f"port {fixed}, set for {port_name}, is taken by another program")

    def _record(self, name: PartName, ref: ProcessRef, state: State) -> None:
        with self._mutex:
            state.processes[name] = ref
            self._file.save(state)

    def _take_down(self, part: Part) -> None:
        part.stop()
        part.end_leftovers()

    def _each(self, action: Callable[[Part], None]) -> None:
        """Act on all parts at once; every one is acted on, then the first failure is raised."""
        with ThreadPoolExecutor(len(PARTS), thread_name_prefix="stack") as pool:
            futures = [pool.submit(action, part) for part in self._parts.values()]
        for future in futures:
            future.result()

    def _settings(self, state: State) -> Settings:
        update: dict[str, object] = {}
        if "postgres" not in self.external:
            update |= {
                "db_host": HOST,
                "db_port": state.ports["postgres"],
                "db_user": SUPERUSER,
                "db_password": SecretStr(state.secret("postgres")),
                "db_app_password": SecretStr(state.secret("postgres-app")),
                "db_read_host": None,
            }
            if self._base.webhook_keys is None:
                key = hashlib.sha256(state.secret("webhooks").encode()).hexdigest()
                update |= {"webhook_keys": SecretStr(f"local:{key}")}
        if "valkey" not in self.external:
            password = SecretStr(state.secret("valkey"))
            update |= {"redis_host": HOST, "redis_port": state.ports["valkey"], "redis_password": password}
        if "kafka" not in self.external:
            update |= {
                "kafka_bootstrap_servers": f"{HOST}:{state.ports['kafka']}",
                "kafka_security_protocol": "PLAINTEXT",
                "kafka_sasl_username": None,
                "kafka_sasl_password": None,
                "kafka_ssl_ca_file": None,
                "kafka_ssl_cert_file": None,
                "kafka_ssl_key_file": None,
            }
        return self._base.model_copy(update=update)

    def _status(self, name: PartName) -> PartStatus:
        if name in self.external:
            return PartStatus(name, "external", self._named_address(name))
        part = self._parts[name]
        address = f"{HOST}:{part.port}"
        if not part.running or part.process.ref is None:
            return PartStatus(name, "stopped", address)
        how: Literal["running", "silent"] = "running" if part.answers() else "silent"
        return PartStatus(name, how, address, pid=part.process.ref.pid, log=part.process.log)

    def _is_own(self, name: PartName) -> bool:
        """Whether the environment's address of a part is the one that this stack has stored for it."""
        port = self._file.load().ports.get(name)
        return port is not None and self._named_address(name) == f"{HOST}:{port}"

    def _named_address(self, name: PartName) -> str:
        """Where the environment says that a part is."""
        addresses = {
            "kafka": self._base.kafka_bootstrap_servers,
            "postgres": f"{self._base.db_host}:{self._base.db_port}",
            "valkey": f"{self._base.redis_host}:{self._base.redis_port}",
        }
        return addresses[name]
