"""What every part of a run stands on: services of its own, a folder for logs, and names that nothing else has."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from settler_streams.dev.stack import ChildProcess
from settler_streams.dev.stack.stack import GIVEN_BY, PARTS
from settler_streams.dev.system import LocalSystem
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings
from settler_streams.topology import Topology, load_topology

Say = Callable[[str], None]

SEED = 20_260_101
TENANTS = 1_000
READY_S_MAX = 60.0
"""A worker joins its groups within seconds; on two busy cores that has taken half a minute."""
STOP_S_MAX = 20.0
"""A worker drains within ten seconds and then leaves its groups."""

LINE_CHARACTERS_MAX = 300
"""Of a log that an error quotes: a whole traceback is one line there, and stays in the file."""


@dataclass(frozen=True, slots=True)
class Ground:
    """The services of one run, which are deleted after it. ``say`` tells people how far it is."""

    system: LocalSystem
    settings: Settings
    folder: Path
    say: Say
    topology: Topology

    @property
    def broker_pid(self) -> int:
        """The process of the broker."""
        pid = next((part.pid for part in self.system.stack.status() if part.name == "kafka"), None)
        if pid is None:
            raise UnavailableError("the broker has ended")
        return pid

    def deployment(self, name: str) -> Settings:
        """The settings of a deployment for one measurement."""
        return self.settings.model_copy(update={"deployment": f"{self.settings.deployment}-{name}"})

    def process(self, settings: Settings, name: str, *command: str) -> ChildProcess:
        """A Python process of ``settings``, not started yet; ``command`` begins with its module."""
        name = f"{settings.deployment}-{name}"
        return ChildProcess(
            name,
            [sys.executable, "-m", *command],
            log=self.folder / f"{name}.log",
            cwd=self.folder,
            environ={**os.environ, **settings.environment()},
        )


@asynccontextmanager
async def prepared(state_dir: Path, say: Say) -> AsyncIterator[Ground]:
    """Start the services under ``state_dir``; afterwards stop and delete them, whatever happened.

    Services that the environment names stay untouched. The processes' logs are kept when something fails.
    """
    system = _own_system(state_dir.absolute() / f"bench-{secrets.token_hex(3)}")  # noqa: ASYNC240 - no I/O in it
    home = system.state_dir
    folder = home.with_name(f"{home.name}-logs")
    folder.mkdir(parents=True)
    try:
        say("starting Kafka, PostgreSQL and Valkey")
        settings = await asyncio.to_thread(system.stack.up, PARTS)
        yield Ground(system, settings, folder, say, load_topology())
    except BaseException:
        for log in home.glob("processes/*.log"):
            shutil.copy(log, folder)
        say(f"the processes' logs are in {folder}")
        raise
    else:
        shutil.rmtree(folder)
    finally:
        await asyncio.to_thread(_clean, system)


@asynccontextmanager
async def running(processes: Sequence[ChildProcess]) -> AsyncIterator[None]:
    """Start processes; stop them at the end."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            await asyncio.to_thread(process.stop, deadline_s=STOP_S_MAX)


async def wait_for_line(process: ChildProcess, line: str) -> None:
    """Wait until a process has logged ``line``."""
    await asyncio.to_thread(process.wait_for_line, line, deadline_s=READY_S_MAX)


def check_alive(processes: Sequence[ChildProcess]) -> None:
    """Whether all still run.

    Raises:
        UnavailableError: one has ended; quotes its log.
    """
    for process in processes:
        if not process.running:
            tail = "\n".join(line[:LINE_CHARACTERS_MAX] for line in process.log_tail().splitlines())
            raise UnavailableError(f"{process.name} ended; its log ends:\n{tail}")


def _own_system(home: Path) -> LocalSystem:
    environ = {name: value for name, value in os.environ.items() if name not in GIVEN_BY.values()}
    environ |= {"SETTLER_DEPLOYMENT": home.name, "SETTLER_DATA_DIR": str(home / "data")}
    return LocalSystem(home, environ=environ)


def _clean(system: LocalSystem) -> None:
    system.down()
    system.delete()
