"""The whole system on one machine: the embedded services, and our own processes as children beside them."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil

from settler_streams.adapters.kafka import broker
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.dev.stack import ChildProcess, EmbeddedStack, ProcessRef, ports
from settler_streams.dev.stack.folders import make_folder
from settler_streams.dev.stack.process import START_TIME_SLACK_S, accepts, end_all
from settler_streams.dev.stack.stack import PartStatus
from settler_streams.dev.stack.state import State, StateFile, locked
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

HOST = "127.0.0.1"
LOCK_S_MAX = 900.0
"""Another start may be fetching the services over a slow line."""
READY_S_MAX = 90.0
"""A worker joins one consumer group per role; on two busy cores that has taken half a minute."""
STOP_S_MAX = 40.0
"""An executor lets running attempts finish for twenty seconds, then leaves; a worker needs less."""
ORPHAN_S_MAX = 5.0
"""Children of a killed process have nobody left to work for; they need no time to finish."""
RESTARTS_MAX = 5
"""A process that has ended this often ends again: the reason is not chance, and somebody has to look."""
PROCESSES_MAX = 16
"""Workers, and executors, of one local system: more would only share the same cores."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One of our own processes. ``metrics_url`` is where it serves its metrics."""

    name: str
    state: Literal["running", "stopped"]
    metrics_url: str
    pid: int | None
    log: Path


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """How the local system is. ``settings`` reach it; they mean something while it runs."""

    services: list[PartStatus]
    processes: list[ProcessStatus]
    settings: Settings

    @property
    def running(self) -> bool:
        """Whether every service answers and every process of ours lives."""
        services = all(part.state in ("running", "external") for part in self.services)
        return services and bool(self.processes) and all(one.state == "running" for one in self.processes)


class LocalSystem:
    """One system per state directory; every method may be called from any process.

    Children outlive the process that started them, also when it crashes: the next :meth:`up` finds and reuses them.

    Args:
        state_dir: holds the services' data, logs, and what is needed to find everything again.
        environ: where settings and external services are read from; by default this process's environment.
    """

    def __init__(self, state_dir: Path, *, environ: Mapping[str, str] | None = None) -> None:
        self.state_dir = Path(os.path.abspath(state_dir))  # noqa: PTH100 - resolve() would follow links
        self._environ = os.environ if environ is None else environ
        self.stack = EmbeddedStack(self.state_dir / "services", environ=environ)
        self._home = self.state_dir / "processes"
        self._file = StateFile(self._home / "state.json")
        self._children: dict[str, ChildProcess] = {}
        self._restarts: dict[str, int] = {}

    def up(self, executors: int = 1, workers: int = 1, *, gateway: bool = True, courier: bool = False) -> Settings:
        """Have everything running: services, schema, topics, then this many processes of ours.

        What runs already is reused; surplus workers and executors are stopped. On failure the processes that this call
        has started are stopped again.

        Returns:
            the settings that reach the system.

        Raises:
            ConfigurationError: the ``embedded`` extra is missing, or the broker's topics contradict the topology.
            UnavailableError: something did not become ready; the message quotes its log.
        """
        if not (0 <= executors <= PROCESSES_MAX and 0 <= workers <= PROCESSES_MAX):
            raise UnavailableError(f"{workers} workers, {executors} executors: at most {PROCESSES_MAX} of each here")
        settings = self.stack.up()
        make_folder(self._home, 0o700)
        with self._locked():
            _run(prepare(settings))
            state = self._load()
            wanted = [*_numbered("worker", workers), *_numbered("executor", executors)]
            wanted += ["courier"] * courier + ["gateway"] * gateway
            self._stop([name for name in self._children if name not in wanted], state)
            fresh = [name for name in wanted if not self._alive(name)]
            try:
                for name in fresh:
                    self._spawn(name, settings, state)
                for name in wanted:
                    self._wait_ready(name, state)
            except BaseException:
                self._stop(fresh, state)
                raise
            return self._with_ports(settings, state)

    def down(self) -> None:
        """Stop our processes, in order and on time, then the services."""
        if self._home.is_dir():
            with self._locked():
                state = self._load()
                self._stop(list(self._children), state)
        self.stack.down()

    def delete(self) -> None:
        """Delete what the system keeps: its services' data, its logs and its state. Only after :meth:`down`.

        Record sets that lie elsewhere stay, and so do services that the environment names.
        """
        self.stack.destroy()
        shutil.rmtree(self.state_dir, ignore_errors=not self.state_dir.exists())

    def status(self) -> SystemStatus:
        """How everything is now. Takes no lock, so that it also answers during a start."""
        state = self._load()
        processes = [
            ProcessStatus(
                name=name,
                state="running" if child.running else "stopped",
                metrics_url=self._metrics_url(name, state),
                pid=child.ref.pid if child.ref is not None and child.running else None,
                log=child.log,
            )
            for name, child in sorted(self._children.items())
        ]
        return SystemStatus(self.stack.status(), processes, self._with_ports(self.stack.settings, state))

    @property
    def settings(self) -> Settings:
        """The settings that reach the system, from what is stored; they mean something while it runs."""
        return self._with_ports(self.stack.settings, self._load())

    @property
    def taken_down(self) -> bool:
        """Whether somebody has stopped it: no process of ours is wanted any more."""
        return not self._load().processes

    def restart_ended(self) -> list[str]:
        """Start the processes again that have ended by themselves; returns their names.

        Raises:
            UnavailableError: one has ended too often; the message quotes its log.
        """
        with self._locked():
            state = self._load()
            ended = [name for name, child in self._children.items() if not child.running]
            for name in ended:
                self._restarts[name] = self._restarts.get(name, 0) + 1
                if self._restarts[name] > RESTARTS_MAX:
                    tail = self._children[name].log_tail()
                    raise UnavailableError(f"{name} has ended {RESTARTS_MAX} times; its log ends:\n{tail}")
                self._spawn(name, self.stack.settings, state)
        return ended

    def _spawn(self, name: str, settings: Settings, state: State) -> None:
        """Start one process; its ports stay the same from one start to the next while nobody else takes them."""
        port = state.ports.get(name)
        if port is None or not ports.is_free(port):
            state.ports[name] = ports.free_port(taken=state.ports.values())
        given = settings.model_copy(
            update={
                "gateway_host": HOST,
                "gateway_port": state.ports["gateway"] if name == "gateway" else settings.gateway_port,
                "metrics_port": 0 if name == "gateway" else state.ports[name],
                "service_name": f"settler-{_kind(name)}",
            }
        )
        # The process's own environment first: it holds PATH and HOME, which libraries look for.
        environ = {**self._environ, **given.environment()}
        if (former := state.processes.get(name)) is not None:
            end_orphans(former)
        command = [sys.executable, "-m", "settler_streams.cli.main", _kind(name)]
        child = ChildProcess(name, command, log=self._home / f"{name}.log", cwd=self._home, environ=environ)
        state.processes[name] = child.start()
        self._children[name] = child
        self._file.save(state)

    def _wait_ready(self, name: str, state: State) -> None:
        child = self._children[name]
        if name == "gateway":
            child.wait_until(lambda: accepts(HOST, state.ports[name]), deadline_s=READY_S_MAX)
        else:
            child.wait_for_line(f"{_kind(name)} ready", deadline_s=READY_S_MAX)

    def _stop(self, names: list[str], state: State) -> None:
        """Stop these at once, each within its own deadline, and forget them."""
        children = [self._children.pop(name) for name in names if name in self._children]
        with ThreadPoolExecutor(PROCESSES_MAX, thread_name_prefix="stop") as pool:
            futures = [pool.submit(child.stop, deadline_s=STOP_S_MAX) for child in children]
        for future in futures:
            future.result()
        for name in names:
            if (former := state.processes.pop(name, None)) is not None:
                end_orphans(former)
        self._file.save(state)

    def _load(self) -> State:
        """The stored state, with a handle for every process that it names, dead ones included."""
        state = self._file.load()
        for name, ref in state.processes.items():
            known = self._children.get(name)
            if known is None or known.ref != ref:
                child = ChildProcess(name, [], log=self._home / f"{name}.log", cwd=self._home)
                child.adopt(ref)
                self._children[name] = child
        for name in self._children.keys() - state.processes.keys():
            del self._children[name]
        return state

    def _alive(self, name: str) -> bool:
        return name in self._children and self._children[name].running

    def _with_ports(self, settings: Settings, state: State) -> Settings:
        if "gateway" not in state.ports:
            return settings
        return settings.model_copy(update={"gateway_host": HOST, "gateway_port": state.ports["gateway"]})

    def _metrics_url(self, name: str, state: State) -> str:
        return f"http://{HOST}:{state.ports.get(name, 0)}/metrics"

    def _locked(self) -> Any:
        return locked(self._home / "lock", deadline_s=LOCK_S_MAX)


async def prepare(settings: Settings) -> tuple[list[str], list[broker.Difference]]:
    """Migrate the database and apply the topology; returns what was done. Repeatable.

    Raises:
        ConfigurationError: what is there contradicts what is declared.
        UnavailableError: PostgreSQL or Kafka did not answer.
    """
    migrations = await migrate(settings)
    async with Cluster.of(settings).admin() as client:
        declared = load_topology().declared(settings.deployment)
        changes = await broker.apply(client, declared, settings.kafka_replication_factor)
    return migrations, changes


def end_orphans(former: ProcessRef) -> None:
    """End what a process that was killed has left behind: each of ours leads a session, and its children stay in it.

    Does nothing while the process lives, or once its pid belongs to another.
    """
    try:
        holder = psutil.Process(former.pid)
        if former.find() is not None or abs(holder.create_time() - former.started_s) > START_TIME_SLACK_S:
            return
    except psutil.NoSuchProcess:
        pass  # reaped; otherwise it is a zombie here
    end_all((one for one in psutil.process_iter() if _session_of(one.pid) == former.pid), deadline_s=ORPHAN_S_MAX)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended, or is none of ours
        return None


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run in a loop of its own, in a thread of its own: the caller may be inside a running loop."""
    with ThreadPoolExecutor(1, thread_name_prefix="system") as pool:
        return pool.submit(asyncio.run, work).result()


def _numbered(kind: str, count: int) -> list[str]:
    return [f"{kind}-{number}" for number in range(1, count + 1)]


def _kind(name: str) -> str:
    return name.partition("-")[0]
