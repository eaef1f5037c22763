"""Exports: all that is held of one tenant, in a folder of plain files with a manifest.

::

    manifest.json             what is in it, with the number of lines or bytes and the SHA-256 of every file
    tables/<table>.jsonl      the rows in PostgreSQL, as of one moment
    events/<topic>.jsonl      the records that Kafka still holds: key and value as text, or in base64
    files/...                 the record sets
    files-not-utf8/<number>   those whose names are not UTF-8, as the manifest is; it has the names in percent-encoding

The folder appears under its name when it is complete. What a killed export has left lies beside it, as
``<name>.partial``, and is made anew by the next one. Whoever is at it has it locked: a second one is refused.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote_to_bytes

import msgspec

from settler_streams.adapters.kafka.tenant_records import TenantRecord, TenantRecords
from settler_streams.adapters.postgres.tenant_rows import TenantRows, tenant_transaction
from settler_streams.errors import ConflictError, InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.services import audit
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

FORMAT = 1
MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20

Progress = Callable[[str], None]
"""Told the name of each file when it is complete."""


class ExportedFile(msgspec.Struct, frozen=True):
    """A file of the export; ``lines`` only where it has lines. The checksum is SHA-256, in hexadecimal.

    ``name`` is the path that it would have if every name could be written here; percent-encoded, and only if it has
    another one.
    """

    path: str
    size: int
    sha256: str
    lines: int | None = None
    name: str | None = None

    @property
    def own_path(self) -> str:
        """The path by its own name, which need not be UTF-8: bytes that are not are surrogates, as in the ``os``."""
        return self.path if self.name is None else os.fsdecode(unquote_to_bytes(self.name))


class Manifest(msgspec.Struct, frozen=True):
    """What an export holds. ``layout`` is the number of the last migration; secrets are hashes and the like."""

    format: int
    tenant_id: TenantId
    root_id: TenantId
    taken_at: dt.datetime
    layout: int
    secrets: bool
    files: list[ExportedFile]


async def export_tenant(
    settings: Settings,
    tenant_id: TenantId,
    folder: Path,
    *,
    secrets: bool = False,
    actor: str = PLATFORM_ACTOR,
    request_id: str | None = None,
    progress: Progress = lambda _name: None,
) -> Manifest:
    """Write everything that is held of a tenant to ``folder``, in bounded memory.

    Who wants it is in the audit log before anything is read, also if nothing comes of it.

    Args:
        settings: of the deployment; the owner's login is used, since services cannot read for so long.
        tenant_id: whose data.
        folder: is made; must not be there yet.
        secrets: with the hashes of passwords and keys and the encrypted secrets, as a backup needs them.
        actor: who wants it.
        request_id: of the request that asked for it.
        progress: told each file.

    Raises:
        ConflictError: ``folder`` is there already, or another export to it is under way.
        NotFoundError: there is no such tenant.
        UnavailableError: PostgreSQL or Kafka did not answer; run it again.
    """
    with _begun(folder) as partial:
        writer = _Writer(partial, progress)
        async with tenant_transaction(settings, tenant_id) as tx:
            await audit.record(
                tx, tenant_id, "tenant.exported", f"tenant/{tenant_id}",
                after={"secrets": secrets}, actor=actor, request_id=request_id,
            )  # fmt: skip
        async with TenantRows.open(settings, tenant_id) as rows:
            root_id = TenantId(await rows.root_id())
            for table in await rows.tables():
                with writer.file(f"tables/{table}.jsonl") as file:
                    file.lines = await rows.copy(table, file.write, secrets=secrets)
            layout = await rows.layout()
        async with TenantRecords(settings, load_topology(), tenant_id, root_id).opened() as records:
            for topic in records.topics():
                with writer.file(f"events/{topic}.jsonl") as file:
                    file.lines = 0
                    async for record in records.read(topic):
                        file.append(msgspec.json.encode(_shown(record)) + b"\n")
                        file.lines += 1
        await asyncio.to_thread(_copy_record_sets, settings.record_sets_dir / tenant_id, writer)
        manifest = Manifest(FORMAT, tenant_id, root_id, dt.datetime.now(dt.UTC), layout, secrets, writer.files)
        _finish(partial, folder, manifest)
    return manifest


def problems(folder: Path) -> list[str]:
    """In what a folder differs from its manifest; empty when it is whole.

    Raises:
        InvalidRequestError: it has no manifest, or one of another format.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequestError(f"{folder} is not an export: {error}") from error
    if manifest.format != FORMAT:
        raise InvalidRequestError(f"{folder} has format {manifest.format}; this program knows {FORMAT}")
    found = []
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            found.append(f"{file.path} is missing")
        elif (path.stat().st_size, _sha256(path)) != (file.size, file.sha256):
            found.append(f"{file.path} is not what was exported")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = there - {file.path for file in manifest.files} - {MANIFEST}
    return found + [f"{name} is not part of the export" for name in sorted(extra)]


@contextmanager
def _begun(folder: Path) -> Iterator[Path]:
    """An empty folder to write to, instead of what an export that was killed has left; locked until it is left."""
    if folder.exists():
        raise ConflictError(f"{folder} is there already; an export does not overwrite")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = partial.stat().st_ino == os.fstat(held).st_ino  # else another one has finished in between
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ConflictError(f"another export to {folder} is under way, or has just ended")
        for left in partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield partial
    finally:
        os.close(held)  # and with it the lock, which also ends with the process


def _finish(partial: Path, folder: Path, manifest: Manifest) -> None:
    with (partial / MANIFEST).open("xb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder)


class _File:
    """One file being written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.lines: int | None = None

    def append(self, data: bytes) -> None:
        """Write ``data``."""
        self._file.write(data)
        self._sha256.update(data)
        self.size += len(data)

    async def write(self, data: bytes) -> None:
        """As :meth:`append`, for those that await it."""
        self.append(data)

    def checksum(self) -> str:
        """Of what has been written."""
        return self._sha256.hexdigest()


class _Writer:
    """Writes files below one folder, and remembers what was written."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self.files: list[ExportedFile] = []

    @contextmanager
    def file(self, name: str) -> Iterator[_File]:
        """A new file, on the disk once it is left. One that turns out to be empty of lines is not kept."""
        own_name = None
        try:
            name.encode()
        except UnicodeEncodeError:
            # Not under its escaped name, which can be longer than a file system takes, or be another file's.
            own_name, name = quote(os.fsencode(name)), f"files-not-utf8/{len(self.files)}"
        path = self._folder / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("xb") as opened:
            file = _File(opened)
            yield file
            opened.flush()
            os.fsync(opened.fileno())
        if file.lines == 0:
            path.unlink()
            return
        self.files.append(ExportedFile(name, file.size, file.checksum(), file.lines, own_name))
        self._progress(name)


def _shown(record: TenantRecord) -> dict[str, object]:
    return {
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        **_text("key", record.key),
        **_text("value", record.value),
    }


def _text(name: str, data: bytes | None) -> dict[str, str | None]:
    """As text if it is text, else in base64 under another name."""
    if data is None:
        return {name: None}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(data).decode()}


def _copy_record_sets(source: Path, writer: _Writer) -> None:
    """Regular files below the tenant's directory. A symbolic link is not followed: it may lead out of it."""
    for folder, _, names in os.walk(source):
        for name in sorted(names):
            path = Path(folder) / name
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue
                raise
            with os.fdopen(descriptor, "rb") as content:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    with writer.file(f"files/{path.relative_to(source).as_posix()}") as file:
                        while chunk := content.read(CHUNK_BYTES):
                            file.append(chunk)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
