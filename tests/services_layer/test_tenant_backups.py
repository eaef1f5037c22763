"""Backups: a tenant that is gone comes back whole, or not at all, and nobody else notices."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_schemas import move, owner_connection
from settler_streams.adapters.valkey.tenant_cache import TenantCache
from settler_streams.errors import ConflictError, InvalidRequestError
from settler_streams.events import RejectReason
from settler_streams.ids import TenantId
from settler_streams.services import Scope, Tenant
from settler_streams.services.backups import RESTORED, restore_tenant
from settler_streams.services.exports import MANIFEST, Manifest, export_tenant, problems
from settler_streams.services.tenant_store import VALUE_FORMAT
from settler_streams.settings import Settings
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.services_layer.platform import Platform, settled
from tests.services_layer.test_tenant_life import decision_on_a_job, known_as

pytestmark = pytest.mark.services

ANNOUNCED = {"tenants": {"version", "updated_at"}}
"""What is not as it was in a restored tenant, but for two entries more in the audit log."""
OF_NO_TABLE = {"tenant_children", "webhook_lanes"}


@pytest.fixture
def settings(platform: Platform, tmp_path: Path) -> Settings:
    return platform.settings.model_copy(update={"data_dir": tmp_path / "data-dir"})


async def lived_in(platform: Platform, settings: Settings, **more: object) -> Tenant:
    """A tenant with a row in every table, a webhook with its lane, and two files."""
    tenant = (await platform.new_tenant(**more)).tenant  # type: ignore[arg-type]
    async with platform.pool.tenant(tenant.id) as tx:
        for table in ROWS.keys() - OF_NO_TABLE:
            await tx.execute(ROWS[table], tenant.id, uuid.uuid4())
        await tx.execute("INSERT INTO webhook_lanes (tenant_id, webhook_id) SELECT tenant_id, id FROM webhooks")
        await tx.execute("UPDATE api_keys SET name = 'ключ \"\\' || chr(10) || chr(1) || chr(2)")
    write_record_sets(settings.record_sets_dir / tenant.id / "2026", f"of {tenant.id}")
    return tenant


def write_record_sets(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "left.csv").write_text(content)
    (folder / "empty.csv").touch()


async def remove(settings: Settings, tenant: TenantId) -> None:
    """Everything of a tenant but its events, as the owner."""
    async with owner_connection(settings) as owner, owner.transaction():
        schema = await owner.fetchval(queries.SCHEMA_OF, tenant)
        if schema is not None:
            await owner.execute(f"DROP SCHEMA {schema} CASCADE")
        await owner.execute("SET LOCAL session_replication_role = replica")  # whatever refers to whom
        for (table,) in await owner.fetch(queries.TABLES_WITH_TENANTS):
            await owner.execute(f"DELETE FROM {table} WHERE {'id' if table == 'tenants' else 'tenant_id'} = $1", tenant)
        await owner.execute("DELETE FROM tenant_children WHERE child_id = $1", tenant)
    await asyncio.to_thread(shutil.rmtree, settings.record_sets_dir / tenant, ignore_errors=True)


async def others(settings: Settings, *tenants: TenantId) -> dict[str, str]:
    """A digest of every table, without the rows of some tenants, and of the record sets."""
    digests = {}
    async with owner_connection(settings) as owner:
        for (table,) in await owner.fetch(queries.TABLES_WITH_TENANTS):
            column = "id" if table == "tenants" else "tenant_id"
            digests[table] = await owner.fetchval(
                f"SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM {table} AS t WHERE {column} <> ALL ($1)",
                list(tenants),
            )
    return digests | await asyncio.to_thread(record_sets, settings, *tenants)


def record_sets(settings: Settings, *without: TenantId) -> dict[str, str]:
    paths = [path for path in settings.record_sets_dir.rglob("*") if path.is_file()]
    named = {path.relative_to(settings.record_sets_dir).as_posix(): path for path in paths}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.startswith(without)
    }


def rows(folder: Path, *, restored: bool = False) -> dict[str, list[str]]:
    """The rows of every table, without what the announcement has changed, sorted.

    What was exported to look at what was ``restored`` has that export in its audit log, too, which is left out.
    """
    found = {}
    for path in (folder / "tables").iterdir():
        changed = ANNOUNCED.get(path.stem, set())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in lines if line.get("action") not in ("tenant.announced", RESTORED)]
        if restored and path.stem == "audit_logs":
            lines.remove(max((line for line in lines if line["action"] == "tenant.exported"), key=itemgetter("id")))
        found[path.stem] = sorted(json.dumps({k: v for k, v in line.items() if k not in changed}) for line in lines)
    return found


def files(folder: Path) -> dict[str, bytes]:
    below = folder / "files"
    return {str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()}


def assert_same(restored: Path, backup: Path) -> None:
    assert rows(restored, restored=True) == rows(backup)
    assert files(restored) == files(backup) != {}
    for path in (backup / "tables").iterdir():
        if path.stem not in (*ANNOUNCED, "audit_logs"):
            exported = sorted((restored / "tables" / path.name).read_bytes().splitlines())
            assert exported == sorted(path.read_bytes().splitlines()), path.name


async def test_a_tenant_that_is_gone_comes_back_as_it_was_and_nobody_else_changes(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant, _other = await lived_in(platform, settings), await lived_in(platform, settings)
    child = await lived_in(platform, settings, parent_id=tenant.id)
    issued = await platform.tenants.issue_api_key(tenant.id, [Scope.JOBS_WRITE])
    backup = tmp_path / "backup"
    exported = await export_tenant(settings, tenant.id, backup, secrets=True)
    assert {Path(f.path).stem for f in exported.files if f.path.startswith("tables/")} >= ROWS.keys() - {
        "webhook_lanes"
    }
    await platform.tenants.rename(tenant.id, "renamed after the backup")
    later = await platform.tenants.suspend(tenant.id)
    await known_as(platform, later)
    assert (await decision_on_a_job(platform, tenant)).reason is RejectReason.TENANT_SUSPENDED
    await remove(settings, tenant.id)
    before = await others(settings, tenant.id)

    told: list[str] = []
    restored = await restore_tenant(settings, backup, actor="me", progress=told.append)
    expected = [f for f in exported.files if not f.path.startswith("events/")]
    assert sorted(told) == sorted(f.path for f in expected)
    assert restored.rows == sum(f.lines or 0 for f in expected)
    assert (restored.tenant_id, restored.files) == (tenant.id, 2)
    assert restored.version == later.version + 1, "above what was announced after the backup, too"
    assert await others(settings, tenant.id) == before
    await settled(platform.directory.feed, lambda: version_known(platform, tenant.id) == restored.version)

    await export_tenant(settings, tenant.id, tmp_path / "restored", secrets=True)
    assert_same(tmp_path / "restored", backup)
    assert (await platform.tenants.get(tenant.id)).version == restored.version
    async with platform.pool.tenant(tenant.id) as tx:
        audit = await tx.fetch(
            "SELECT action, actor FROM audit_logs WHERE action IN ('tenant.announced', $1)", RESTORED
        )
        assert {tuple(row) for row in audit} == {("tenant.announced", "me"), (RESTORED, "me")}
        lanes = await tx.fetchval("SELECT count(*) FROM webhook_lanes JOIN webhooks ON id = webhook_id")
        assert lanes == await tx.fetchval("SELECT count(*) FROM webhooks") == 2
    assert [c.id for c in await platform.tenants.children(tenant.id)] == [child.id]
    assert (await decision_on_a_job(platform, tenant)).admitted
    assert (await platform.tenants.authenticate(issued.key)).tenant_id == tenant.id
    assert (await platform.tenants.suspend(tenant.id)).version == restored.version + 1


def version_known(platform: Platform, tenant: TenantId) -> int:
    known = platform.directory.get(tenant)
    return 0 if known is None else known.version


async def test_what_the_cache_holds_of_a_restored_tenant_is_void(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = await lived_in(platform, settings)
    await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    await remove(settings, tenant.id)
    cache = TenantCache(settings, value_format=VALUE_FORMAT)
    found = await cache.read(tenant.id)
    assert found is not None
    assert found.lease is not None
    assert await cache.store(tenant.id, tenant.version, b"stale", found.lease)
    restored = await restore_tenant(settings, tmp_path / "backup")
    found = await cache.read(tenant.id)
    assert found is not None
    assert (found.version, found.value) == (restored.version, None)
    await cache.close()


@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True), (True, True)])
async def test_a_tenant_comes_back_into_the_layout_that_the_deployment_has(
    platform: Platform, settings: Settings, tmp_path: Path, before: bool, after: bool
) -> None:
    tenant = await lived_in(platform, settings)
    if before:
        await move(settings, tenant.id, own_schema=True)
    await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    await remove(settings, tenant.id)
    deployed = settings.model_copy(update={"enable_schema_per_tenant": after})
    await restore_tenant(deployed, tmp_path / "backup")
    async with owner_connection(settings) as owner:
        assert (await owner.fetchval(queries.SCHEMA_OF, tenant.id) is not None) == after
        shared = await owner.fetchval("SELECT count(*) FROM public.users WHERE tenant_id = $1", tenant.id)
        assert shared == (0 if after else 2)
    await export_tenant(settings, tenant.id, tmp_path / "restored", secrets=True)
    assert_same(tmp_path / "restored", tmp_path / "backup")


async def test_also_a_tenant_with_few_rows_comes_back_into_its_schema_with_each_of_them(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    """Its first table in the alphabet is one that refers to no other, and none that is behind it refers to tenants."""
    tenant = (await platform.new_tenant()).tenant
    async with platform.pool.tenant(tenant.id) as tx:
        await tx.execute(ROWS["jobs"], tenant.id, uuid.uuid4())
    await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    assert not (tmp_path / "backup" / "tables" / "api_keys.jsonl").exists()
    await remove(settings, tenant.id)
    await restore_tenant(settings.model_copy(update={"enable_schema_per_tenant": True}), tmp_path / "backup")
    async with owner_connection(settings) as owner:
        for table in ("users", "jobs", "audit_logs"):
            lies = await owner.fetchval(f"SELECT count(*) FROM public.{table} WHERE tenant_id = $1", tenant.id)
            assert lies == 0, table
    await export_tenant(settings, tenant.id, tmp_path / "restored", secrets=True)
    assert rows(tmp_path / "restored", restored=True) == rows(tmp_path / "backup")


async def test_a_family_comes_back_from_the_root_down(platform: Platform, settings: Settings, tmp_path: Path) -> None:
    parent = await lived_in(platform, settings)
    child = await lived_in(platform, settings, parent_id=parent.id)
    for tenant in (parent, child):
        await export_tenant(settings, tenant.id, tmp_path / tenant.id, secrets=True)
    for tenant in (child, parent):
        await remove(settings, tenant.id)
    with pytest.raises(ConflictError, match=f"the parent of tenant {child.id}, {parent.id}, is not there"):
        await restore_tenant(settings, tmp_path / child.id)
    await restore_tenant(settings, tmp_path / parent.id)
    assert await platform.tenants.children(parent.id) == []
    await restore_tenant(settings, tmp_path / child.id)
    assert [each.id for each in await platform.tenants.children(parent.id)] == [child.id]
    await export_tenant(settings, parent.id, tmp_path / "restored", secrets=True)
    rows_of_parent = rows(tmp_path / "restored", restored=True)
    rows_of_parent["audit_logs"] = [line for line in rows_of_parent["audit_logs"] if "children-listed" not in line]
    assert rows_of_parent == rows(tmp_path / parent.id)


async def test_files_whose_names_are_not_utf8_come_back_under_them(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = await lived_in(platform, settings)
    place, backup = settings.record_sets_dir / tenant.id, tmp_path / "backup"
    strange = [
        b"Zahlung\xe4.csv",
        b"2026/\xff" * 2,
        b"\xcf\xf0/left.csv",
        b"\xe4" * 255,
        "\u00e4\xff".encode("latin-1"),
    ]
    ordinary = [b"Zahlung%E4.csv", b"Zahlung\\xe4.csv", "Zahlung\u00e4.csv".encode(), b"files-not-utf8/20"]
    written = {name: b"of " + name for name in (*strange, *ordinary)}
    await asyncio.to_thread(write_named, place, written)
    before = await asyncio.to_thread(named, place)
    manifest = await export_tenant(settings, tenant.id, backup, secrets=True)
    assert problems(backup) == []
    apart = [file for file in manifest.files if file.name is not None]
    assert "files/Zahlung%E4.csv" in {file.name for file in apart}
    assert (len(apart), {Path(file.path).parts[0] for file in apart}) == (len(strange), {"files-not-utf8"})
    await remove(settings, tenant.id)
    await restore_tenant(settings, backup)
    assert await asyncio.to_thread(named, place) == before
    assert written.items() < before.items()


def write_named(folder: Path, files: dict[bytes, bytes]) -> None:
    for name, content in files.items():
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def named(folder: Path) -> dict[bytes, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {os.fsencode(path.relative_to(folder)): path.read_bytes() for path in paths}


Change = Callable[[Path], None]


def with_manifest(**changes: object) -> Change:
    def change(folder: Path) -> None:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        changed = msgspec.structs.replace(manifest, **changes)
        (folder / MANIFEST).write_bytes(msgspec.json.encode(changed))

    return change


def with_content(name: str, change: Callable[[str], str]) -> Change:
    """A file that was changed together with what the manifest says of it."""

    def changed(folder: Path) -> None:
        path = folder / name
        path.write_text(change(path.read_text()))
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
        content = path.read_bytes()
        replaced = [
            msgspec.structs.replace(f, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            if f.path == name
            else f
            for f in manifest.files
        ]
        with_manifest(files=replaced)(folder)

    return changed


def named_outside(folder: Path) -> None:
    (folder.parent / "outside").write_text("x")
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    path, sha256 = "files/../../outside", hashlib.sha256(b"x").hexdigest()
    outside = msgspec.structs.replace(manifest.files[-1], path=path, size=1, sha256=sha256, lines=None)
    with_manifest(files=[*manifest.files, outside])(folder)


def with_own_name(name: str) -> Change:
    """A file that would be restored to somewhere else."""

    def change(folder: Path) -> None:
        files = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest).files
        with_manifest(files=[*files[:-1], msgspec.structs.replace(files[-1], name=name)])(folder)

    return change


NOBODY = TenantId("00000000-0000-7000-8000-000000000001")


@pytest.mark.parametrize(("change", "error", "why"), [
    (lambda folder: (folder / "tables/users.jsonl").unlink(), InvalidRequestError, "tables/users.jsonl is missing"),
    (lambda folder: (folder / "files/2026/left.csv").write_text("x"), InvalidRequestError, "is not what was exported"),
    (with_manifest(secrets=False), InvalidRequestError, "without --secrets"),
    (with_manifest(layout=9), ConflictError, "the rows are of migration 9, the database is at"),
    (with_manifest(tenant_id=NOBODY), InvalidRequestError, f"is said to be of {NOBODY}"),
    (with_content("tables/users.jsonl", lambda text: text.replace('"tenant_id": "', f'"tenant_id": "{NOBODY}", "": "')),
     InvalidRequestError, "holds rows of another tenant"),
    (with_content("tables/users.jsonl", lambda text: text.replace('"role": "owner"', '"role": "emperor"')),
     InvalidRequestError, "breaks a rule of its table"),
    (named_outside, InvalidRequestError, "is no name in an export"),
    (with_own_name("files/%2E%2E/outside"), InvalidRequestError, "is no name in an export"),
    (with_own_name("files//outside"), InvalidRequestError, "is no name in an export"),
    (with_own_name("%2Fouts%FFide"), InvalidRequestError, "is no name in an export"),
    (with_own_name("files/out%00side"), InvalidRequestError, "is no name in an export"),
])  # fmt: skip
async def test_what_is_not_a_backup_for_this_database_is_refused_and_nothing_is_left(
    platform: Platform, settings: Settings, tmp_path: Path, change: Change, error: type[Exception], why: str
) -> None:
    tenant = await lived_in(platform, settings)
    await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    await remove(settings, tenant.id)
    before = await others(settings)
    await asyncio.to_thread(change, tmp_path / "backup")
    with pytest.raises(error, match=why):
        await restore_tenant(settings, tmp_path / "backup")
    assert await others(settings) == before


async def test_a_tenant_of_which_anything_is_there_is_not_restored(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = await lived_in(platform, settings)
    backup = tmp_path / "backup"
    await export_tenant(settings, tenant.id, backup, secrets=True)
    before = await others(settings)
    with pytest.raises(ConflictError, match=r"something of tenant .* is there: .*audit_logs.*users"):
        await restore_tenant(settings, backup)
    assert await others(settings) == before
    await remove(settings, tenant.id)
    async with owner_connection(settings) as owner:
        async with owner.transaction():
            await owner.execute(NO_RELAY)
            for table, insert in (("outbox", OUTBOX), ("jobs", ROWS["jobs"])):
                async with platform.pool.tenant(tenant.id) as tx:
                    await tx.execute(insert, tenant.id, uuid.uuid4())
                with pytest.raises(ConflictError, match=f"is there: {table}$"):
                    await restore_tenant(settings, backup)
                async with owner_connection(settings) as another:
                    await another.execute(f"DELETE FROM {table} WHERE tenant_id = $1", tenant.id)
        await owner.execute(f"CREATE SCHEMA t_{tenant.id.replace('-', '')}")
        with pytest.raises(ConflictError, match="is there: a schema of its own"):
            await restore_tenant(settings, backup)
        await owner.execute(f"DROP SCHEMA t_{tenant.id.replace('-', '')}")
    await asyncio.to_thread((settings.record_sets_dir / tenant.id).mkdir)
    with pytest.raises(ConflictError, match=r"record sets of tenant .* are there"):
        await restore_tenant(settings, backup)
    await asyncio.to_thread((settings.record_sets_dir / tenant.id).rmdir)
    await platform.tenants.create_tenant(
        name="A", slug=tenant.slug, owner_email="a@b.example", owner_password_hash="unused"
    )
    with pytest.raises(ConflictError, match=r"the slug of tenant .* is taken"):
        await restore_tenant(settings, backup)
    assert await asyncio.to_thread(record_sets, settings) == {}, "nor is a copy of the files left"


OUTBOX = "INSERT INTO outbox (tenant_id, topic, key, event) SELECT $1, 'usage-events', $2::uuid::text, '{}'"
NO_RELAY = "SELECT pg_advisory_xact_lock(hashtextextended('settler/outbox', 0))"


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from settler_streams.adapters.postgres.tenant_restore import TenantRestore
from settler_streams.services import backups
from settler_streams.settings import Settings

def die(*_arguments, **_more):
    os.kill(os.getpid(), signal.SIGKILL)

async def die_async(*arguments, **more):
    die()

point, folder = sys.argv[1], Path(sys.argv[2])
if point == "files staged":
    backups._restore_rows = die_async
elif point == "half the rows":
    insert, done = TenantRestore.insert, []
    async def insert_half(self, table, lines):
        done.append(table)
        if len(done) == 9:
            die()
        return await insert(self, table, lines)
    TenantRestore.insert = insert_half
elif point == "before the commit":
    announce = backups._announce
    async def announce_and_die(*arguments):
        await announce(*arguments)
        die()
    backups._announce = announce_and_die
elif point == "committed":
    backups._rename = die
elif point == "renamed":
    backups._Told.of = die_async
asyncio.run(backups.restore_tenant(Settings.from_environment(), folder))
"""


@pytest.mark.parametrize(
    ("point", "is_there"),
    [
        ("files staged", False),
        ("half the rows", False),
        ("before the commit", False),
        ("committed", True),
        ("renamed", True),
    ],
)
async def test_a_restore_that_is_killed_leaves_nothing_or_everything_and_is_run_again(
    platform: Platform, settings: Settings, tmp_path: Path, point: str, is_there: bool
) -> None:
    tenant = await lived_in(platform, settings)
    backup = tmp_path / "backup"
    await export_tenant(settings, tenant.id, backup, secrets=True)
    await remove(settings, tenant.id)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, point, str(backup), env=settings.environment()
    )
    assert await process.wait() == -signal.SIGKILL
    async with owner_connection(settings) as owner:
        # Once nobody restores it, the server has ended the transaction of the killed one.
        await owner.fetchval(queries.SERIALISE_RESTORE, tenant.id)
        counts = [
            await owner.fetchval(f"SELECT count(*) FROM {table} WHERE tenant_id = $1", tenant.id)
            for table in ("users", "jobs", "audit_logs", "tenant_slugs")
        ]
    assert [count > 0 for count in counts] == [is_there] * 4
    assert await asyncio.to_thread((settings.record_sets_dir / tenant.id).exists) == (point == "renamed")

    restored = await restore_tenant(settings, backup)
    assert (restored.rows > 0) == (not is_there)
    await settled(platform.directory.feed, lambda: version_known(platform, tenant.id) == restored.version)
    await export_tenant(settings, tenant.id, tmp_path / "restored", secrets=True)
    assert_same(tmp_path / "restored", backup)
    assert problems(tmp_path / "restored") == []
    again = await restore_tenant(settings, backup)
    assert (again.rows, again.files, again.version) == (0, 0, restored.version), "there is nothing left to do"
    left = await asyncio.to_thread(lambda: [path.name for path in settings.record_sets_dir.iterdir()])
    assert left == [tenant.id]


async def test_two_restores_at_once_put_it_back_once(platform: Platform, settings: Settings, tmp_path: Path) -> None:
    tenant = await lived_in(platform, settings)
    await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    await remove(settings, tenant.id)
    both = await asyncio.gather(*(restore_tenant(settings, tmp_path / "backup") for _ in range(2)))
    assert sorted(restored.rows > 0 for restored in both) == [False, True]
    await export_tenant(settings, tenant.id, tmp_path / "restored", secrets=True)
    assert_same(tmp_path / "restored", tmp_path / "backup")


async def test_an_owner_that_is_no_superuser_restores_as_well(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    """As on a managed server: row-level security binds the owner."""
    name = f"managed_{uuid.uuid4().hex[:8]}"
    async with owner_connection(settings) as owner:
        await owner.execute(
            f"CREATE ROLE {name} LOGIN CREATEDB CREATEROLE PASSWORD 'managed';"
            f"GRANT settler_services, settler_relay, settler_courier, settler_janitor, settler_eraser TO {name} "
            "WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
        )
    managed = settings.model_copy(
        update={"db_name": name, "db_user": name, "db_password": SecretStr("managed"), "db_app_user": f"{name}_app"}
    )
    await migrate(managed)
    tenant = TenantId(str(uuid.uuid4()))
    pool = await TenantConnectionPool.open(managed)
    async with pool.tenant(tenant) as tx:
        await tx.execute(
            "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')", tenant, name[-8:]
        )
        for table in ROWS.keys() - OF_NO_TABLE:
            await tx.execute(ROWS[table], tenant, uuid.uuid4())
    await pool.close()
    write_record_sets(managed.record_sets_dir / tenant / "2026", "its own")
    await export_tenant(managed, tenant, tmp_path / "backup", secrets=True)
    await remove(settings.model_copy(update={"db_name": name}), tenant)
    assert (await restore_tenant(managed, tmp_path / "backup")).version == 2
    await export_tenant(managed, tenant, tmp_path / "restored", secrets=True)
    assert_same(tmp_path / "restored", tmp_path / "backup")
