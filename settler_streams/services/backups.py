"""Backups: an export that was taken with its secrets, put back where the tenant is gone.

Rows are restored in one transaction, in which the tenant is announced as well. Files are copied to a folder beside
their own before it, ``<tenant>.restoring``, and get their name behind it. So whatever is killed leaves either no
tenant, or all of it up to that name, which the same call then gives.

Not restored: the records in Kafka. What the folds keep of a tenant (usage, flags, jobs under way) is theirs and stays
as it is; the announced version is above every one that they can have seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from settler_streams.adapters import tenant_folder
from settler_streams.adapters.kafka.tenant_records import TenantRecords
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_restore import TENANTS, TenantRestore
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.errors import ConflictError, InvalidRequestError, UnavailableError
from settler_streams.events import TenantStatus
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.services import audit, tenant_store
from settler_streams.services.acknowledgements import Acknowledgements
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.exports import CHUNK_BYTES, MANIFEST, ExportedFile, Manifest, problems
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.publisher import EventPublisher
from settler_streams.services.refusals import taken
from settler_streams.services.tenant_store import SOURCE, VALUE_FORMAT, Tenant
from settler_streams.services.tenants import TenantNotYetKnownError
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction

TABLES, FILES = "tables", "files"
RESTORED = "tenant.backup-restored"
"""How the audit log calls it; the subject is the backup, by the checksum of its manifest."""

Progress = Callable[[str], None]
"""Told the name of each file when it is restored."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore has put back; nothing of the kind where an earlier call had done it already."""

    tenant_id: TenantId
    version: int
    rows: int
    files: int


class _Backup(msgspec.Struct, frozen=True):
    """A folder that is what its manifest says. ``checksum`` is the manifest's; ``parent_id`` stands in the row."""

    folder: Path
    manifest: Manifest
    checksum: str
    parent_id: TenantId | None

    def files(self, below: str) -> dict[str, ExportedFile]:
        """Those under one of its folders by their own paths, by their names there."""
        found = [file for file in self.manifest.files if file.own_path.startswith(f"{below}/")]
        return {file.own_path.removeprefix(f"{below}/"): file for file in found}


class _Row(msgspec.Struct):
    id: str
    parent_id: str | None


class _Versioned(msgspec.Struct):
    version: int = 0


class _Change(msgspec.Struct):
    data: _Versioned


async def restore_tenant(
    settings: Settings, folder: Path, *, actor: str = PLATFORM_ACTOR, progress: Progress = lambda _name: None
) -> Restored:
    """Put a tenant back under its id, as it was when its backup was taken, in bounded memory.

    1. Compare the folder with its manifest; refuse what does not fit here. 2. Copy the record sets beside their place.
    3. In one transaction: all rows, one version more than was ever announced, audit and outbox. 4. Give the record sets
    their name. 5. Wait until admission decides by that version.

    Args:
        settings: of the deployment; the owner's login is used. With ``ENABLE_SCHEMA_PER_TENANT`` the tenant gets a
            schema of its own, whatever it had.
        folder: an export with secrets.
        actor: who wants it.
        progress: told each file.

    Raises:
        InvalidRequestError: the folder is not what was exported, or lacks the secrets.
        ConflictError: something of the tenant is there, its slug is taken, its parent is not there or deleted, or the
            database has another layout than the one that the rows are of.
        NotFoundError: the tenant was erased, which is for good.
        TenantNotYetKnownError: it is restored, but admission has not said in time that it knows.
        UnavailableError: PostgreSQL or Kafka failed, or another restore of the tenant is under way; run it again.
    """
    backup = await asyncio.to_thread(_opened, folder)
    tenant_id = backup.manifest.tenant_id
    async with TenantRestore.open(settings, tenant_id) as restore, _Told.connect(settings) as told:
        place = tenant_folder.folder_of(settings.record_sets_dir, tenant_id)
        staged = tenant_folder.restoring(settings.record_sets_dir, tenant_id)
        if await restore.audited(RESTORED, _subject(backup)):
            await asyncio.to_thread(_rename, staged, place)
            async with restore.transaction() as tx:
                tenant = await tenant_store.read(tx, tenant_id)
            await told.again(tenant)
            return Restored(tenant_id, tenant.version, 0, 0)
        await _refuse(restore, backup, place)
        announced = await _announced(settings, backup.manifest)
        files = await asyncio.to_thread(_stage, backup, staged, progress)
        with told.acknowledgements.expect(tenant_id) as awaited:
            try:
                with taken(f"the slug of tenant {tenant_id} is taken, or a row of it has come meanwhile", of="backup"):
                    async with restore.transaction() as tx:
                        own_schema = settings.enable_schema_per_tenant
                        rows = await _restore_rows(restore, backup, progress, own_schema=own_schema)
                        tenant = await _announce(tx, backup, announced, actor, {"rows": rows, "files": files})
            except (ConflictError, InvalidRequestError):  # rolled back for certain, which others may not be
                await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)
                raise
            await asyncio.to_thread(_rename, staged, place)
            await told.of(tenant)
            try:
                await awaited.wait(tenant.version)
            except UnavailableError as error:
                raise TenantNotYetKnownError(tenant, str(error)) from error
    return Restored(tenant_id, tenant.version, rows, files)


def _opened(folder: Path) -> _Backup:
    """The folder, once it has been compared with its manifest."""
    if found := problems(folder):
        raise InvalidRequestError(f"{folder} is not what was exported: {'; '.join(found[:10])}")
    written = (folder / MANIFEST).read_bytes()
    manifest = msgspec.json.decode(written, type=Manifest)
    if not manifest.secrets:
        raise InvalidRequestError(f"{folder} was exported without --secrets: a tenant cannot be restored from that")
    for name in (name for file in manifest.files for name in (file.path, file.own_path)):
        path = PurePosixPath(name)
        # Nor "files//etc/passwd", of which below "files/" an absolute one would be left.
        if path.is_absolute() or ".." in path.parts or len(path.parts) < 2 or str(path) != name or "\0" in name:
            raise InvalidRequestError(f"{name!r} is no name in an export")
    try:
        row = msgspec.json.decode((folder / TABLES / "tenants.jsonl").read_bytes(), type=_Row)
        tenant_id = canonical_tenant(manifest.tenant_id)
        parent_id = None if row.parent_id is None else canonical_tenant(row.parent_id)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{folder} does not hold one tenant: {error}") from error
    if row.id != tenant_id:
        raise InvalidRequestError(f"{folder} is said to be of {tenant_id} and holds {row.id}")
    return _Backup(folder, manifest, hashlib.sha256(written).hexdigest(), parent_id)


async def _refuse(restore: TenantRestore, backup: _Backup, place: Path) -> None:
    tenant_id = backup.manifest.tenant_id
    if (layout := await restore.layout()) != backup.manifest.layout:
        raise ConflictError(
            f"the rows are of migration {backup.manifest.layout}, the database is at {layout}; restore them with the "
            "release that took them, in a system of its own, migrate that, and export it again"
        )
    if found := await restore.holders():
        raise ConflictError(f"something of tenant {tenant_id} is there: {', '.join(found)}")
    if await asyncio.to_thread(place.exists):
        raise ConflictError(f"record sets of tenant {tenant_id} are there: {place}; move them away")
    if backup.parent_id is not None and not await restore.has_tenant(backup.parent_id):
        raise ConflictError(f"the parent of tenant {tenant_id}, {backup.parent_id}, is not there; restore that first")


async def _announced(settings: Settings, manifest: Manifest) -> int:
    """The highest version of the tenant that was ever announced, 0 if none."""
    highest = 0
    async with TenantRecords(settings, load_topology(), manifest.tenant_id, manifest.root_id).opened() as records:
        async for record in records.read("tenant-changes"):
            try:
                change = msgspec.json.decode(record.value or b"", type=_Change)
            except msgspec.DecodeError:
                continue  # a fold could not read it either, and remembers nothing of it
            highest = max(highest, change.data.version)
    return highest


async def _restore_rows(restore: TenantRestore, backup: _Backup, progress: Progress, *, own_schema: bool) -> int:
    """Every table behind those that it refers to; the tenant is the first."""
    rows = 0
    tables = {name.removesuffix(".jsonl"): file for name, file in backup.files(TABLES).items()}
    await restore.begin()
    for table in await restore.in_order(tables):
        file = tables[table]
        reading = _Reading(backup.folder / file.path)
        inserted = await restore.insert(table, reading)
        if inserted != file.lines or reading.checksum() != file.sha256:
            raise InvalidRequestError(f"{file.path} has changed meanwhile, or holds rows of another tenant")
        if table == TENANTS and own_schema:
            await restore.give_schema()
        rows += inserted
        progress(file.path)
    await restore.finish(backup.parent_id)
    return rows


async def _announce(tx: Transaction, backup: _Backup, announced: int, actor: str, restored: dict[str, Any]) -> Tenant:
    """Within the transaction of the rows: one version more, its event in the outbox, two entries in the audit log."""
    before = await tenant_store.read(tx, backup.manifest.tenant_id)
    if before.status is not TenantStatus.DELETED:
        await tenant_store.refuse_dead_parent(tx, before)
    tenant = replace(before, version=max(before.version, announced) + 1)
    await tenant_store.update(tx, tenant)
    await tenant_store.record(tx, tenant, before, "tenant.announced", actor, None)
    await audit.record(
        tx, tenant.id, RESTORED, _subject(backup), actor=actor, request_id=None,
        after={"taken_at": backup.manifest.taken_at, **restored},
    )  # fmt: skip
    return tenant


def _subject(backup: _Backup) -> str:
    return f"backup/{backup.checksum}"


class _Reading:
    """The chunks of a file, and afterwards the SHA-256 of what was read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with await asyncio.to_thread(self._path.open, "rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                self._sha256.update(chunk)
                yield chunk

    def checksum(self) -> str:
        return self._sha256.hexdigest()


def _stage(backup: _Backup, staged: Path, progress: Progress) -> int:
    """Copy the record sets, instead of what a restore that was killed has left; returns how many."""
    shutil.rmtree(staged, ignore_errors=True)
    files = backup.files(FILES)
    for name, file in files.items():
        path = staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = hashlib.sha256()
        with (backup.folder / file.path).open("rb") as source, path.open("xb") as target:
            while chunk := source.read(CHUNK_BYTES):
                sha256.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        if sha256.hexdigest() != file.sha256:
            raise InvalidRequestError(f"{file.path} has changed meanwhile")
        progress(file.path)
    return len(files)


def _rename(staged: Path, place: Path) -> None:
    if staged.exists():
        staged.rename(place)


class _Told:
    """Those who hear of a restored tenant at once; all others do by its event."""

    def __init__(self, relay: OutboxRelay, acknowledgements: Acknowledgements, copies: TenantCache) -> None:
        self._relay = relay
        self._copies = copies
        self.acknowledgements = acknowledgements

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[_Told]:
        async with AsyncExitStack() as stack:
            pool = await TenantConnectionPool.open(settings)
            stack.push_async_callback(pool.close)
            publisher = EventPublisher(settings, source=SOURCE)
            relay, acknowledgements = OutboxRelay(pool, publisher), Acknowledgements(settings)
            for part in (publisher, relay, acknowledgements):
                await part.start()
                stack.push_async_callback(part.stop)
            copies = TenantCache(settings, value_format=VALUE_FORMAT)
            stack.push_async_callback(copies.close)
            yield cls(relay, acknowledgements, copies)

    async def of(self, tenant: Tenant) -> None:
        """Publish what waits in the outbox, and make older copies void."""
        self._relay.nudge()
        await self._copies.invalidate(tenant.id, tenant.version)

    async def again(self, tenant: Tenant) -> None:
        """As :meth:`of`, for one that may have been announced before: nobody answers a second time."""
        await self._copies.invalidate(tenant.id, tenant.version)
        while await self._relay.publish_pending():
            pass
