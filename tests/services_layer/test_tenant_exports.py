"""Exports: everything that is held of one tenant and nothing of another, whole or not there at all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from settler_streams.adapters.postgres import tenant_rows
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.events import Resource, UsageRecorded
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import CreatedTenant, Scope, move_tenant
from settler_streams.services.exports import MANIFEST, Manifest, export_tenant, problems
from settler_streams.settings import Settings
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services

AUDIT = "tables/audit_logs.jsonl"


@pytest.fixture
def settings(platform: Platform, tmp_path: Path) -> Settings:
    return platform.settings.model_copy(update={"data_dir": tmp_path / "data-dir"})


async def lived_in(platform: Platform, settings: Settings, **more: object) -> CreatedTenant:
    """A tenant with a key, an event in Kafka, an audit log, and two files."""
    created = await platform.new_tenant(**more)  # type: ignore[arg-type]
    tenant = created.tenant
    with platform.tenants._acknowledgements.expect(tenant.id) as awaited:
        await platform.tenants.issue_api_key(tenant.id, [Scope.JOBS_READ])
        await awaited.wait(2)  # what Kafka is told of it is there from now on
    used = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=7)
    await platform.publisher.publish("usage-events", tenant.id, tenant.root_id, used)
    write_record_sets(settings.record_sets_dir / tenant.id / "2026", f"of {tenant.id}")
    return created


def write_record_sets(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "left.csv").write_text(content)
    (folder / "empty.csv").touch()


def lines(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


async def test_an_export_has_everything_of_the_tenant_and_nothing_of_another(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    child = (await lived_in(platform, settings, parent_id=tenant.id)).tenant
    other = (await lived_in(platform, settings)).tenant
    link_to(settings.record_sets_dir / other.id, settings.record_sets_dir / tenant.id)
    folder, told = tmp_path / "export", list[str]()
    manifest = await export_tenant(settings, tenant.id, folder, actor="ann", progress=told.append)
    assert problems(folder) == []
    assert told == [file.path for file in manifest.files]
    assert {Path(name).parts[0] for name in told} == {"tables", "events", "files"}
    assert (manifest.tenant_id, manifest.root_id, manifest.secrets) == (tenant.id, tenant.id, False)

    assert [row["id"] for row in lines(folder, "tables/tenants.jsonl")] == [tenant.id]
    assert [row["role"] for row in lines(folder, "tables/users.jsonl")] == ["owner"]
    audited = {row["action"]: row for row in lines(folder, "tables/audit_logs.jsonl")}
    assert set(audited) == {"tenant.created", "api-key.issued", "tenant.exported"}
    assert (audited["tenant.exported"]["actor"], audited["tenant.exported"]["after"]) == ("ann", {"secrets": False})
    events = [json.loads(str(line["value"])) for line in lines(folder, "events/usage-events.jsonl")]
    assert [(event["tenantid"], event["data"]["quantity"]) for event in events] == [(tenant.id, 7)]
    files = {file.path: file.size for file in manifest.files if file.path.startswith("files/")}
    assert files == {"files/2026/left.csv": len(f"of {tenant.id}"), "files/2026/empty.csv": 0}

    assert [row["child_id"] for row in lines(folder, "tables/tenant_children.jsonl")] == [child.id]
    (folder / "tables/tenant_children.jsonl").unlink()  # which a parent knows of its children, and no more
    content = everything_in(folder)
    for stranger in (child.id, other.id):
        assert stranger.encode() not in content
    for secret in tenant_rows.SECRETS:
        assert secret.encode() not in content


def link_to(other: Path, folder: Path) -> None:
    (folder / "link").symlink_to(other)
    (folder / "file").symlink_to(other / "2026" / "left.csv")


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def test_a_backup_has_the_hashes_too(platform: Platform, settings: Settings, tmp_path: Path) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    manifest = await export_tenant(settings, tenant.id, tmp_path / "backup", secrets=True)
    assert manifest.secrets
    assert lines(tmp_path / "backup", "tables/users.jsonl")[0]["password_hash"] == "unused"
    assert str(lines(tmp_path / "backup", "tables/api_keys.jsonl")[0]["key_hash"]).startswith("\\x")


async def test_every_secret_column_is_known_as_one(platform: Platform, settings: Settings) -> None:
    """By its name or type; one that is added later has to be withheld, or named here."""
    async with platform.pool.platform() as tx:
        suspects = await tx.fetch(
            """SELECT DISTINCT column_name::text FROM information_schema.columns
               WHERE table_schema = 'public' AND table_name NOT IN ('outbox', 'schema_migrations')
                 AND (data_type = 'bytea' OR column_name ~ '(hash|secret|token|password)')"""
        )
    assert {row[0] for row in suspects} <= set(tenant_rows.SECRETS)


async def test_the_export_of_a_tenant_with_a_schema_is_the_same(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    before = await export_tenant(settings, tenant.id, tmp_path / "shared")
    await move_tenant(settings, tenant.id, own_schema=True)
    after = await export_tenant(settings, tenant.id, tmp_path / "own")
    told = {"tables/tenants.jsonl", "events/tenant-changes.jsonl", "events/pool-inputs.jsonl"}  # a version more
    assert before_and_after_alike(before, after, but=told)
    ((was,), (now_is,)) = (lines(tmp_path / name, "tables/tenants.jsonl") for name in ("shared", "own"))
    assert now_is == {**was, "version": 3, "updated_at": now_is["updated_at"]}
    entries = [{row["id"]: row for row in lines(tmp_path / name, AUDIT)} for name in ("shared", "own")]
    assert entries[0].items() < entries[1].items()
    assert {entries[1][added]["action"] for added in entries[1].keys() - entries[0].keys()} == {
        "tenant.moved", "tenant.exported",
    }  # fmt: skip


def before_and_after_alike(before: Manifest, after: Manifest, but: set[str]) -> bool:
    here, there = ({path: sha for path, sha in contents(each).items() if path not in but} for each in (before, after))
    return here == there and len(here) > 3


def contents(manifest: Manifest) -> dict[str, str]:
    """Of what nobody adds to meanwhile: admission reports what the tenant uses, and each export is audited."""
    return {
        file.path: file.sha256 for file in manifest.files if file.path not in ("events/tenant-signals.jsonl", AUDIT)
    }


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from settler_streams.services import exports
from settler_streams.settings import Settings

point, tenant, folder = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def audited_and_die(*_arguments, **_more):
    die()

def told(name):
    if name.startswith(point):
        die()

def half(file, data):
    file._file.write(data[: len(data) // 2])
    file._file.flush()
    die()

if point == "entry":
    exports.TenantRows.tables = audited_and_die
elif point == "half a file":
    exports._File.append = half
elif point == "no manifest":
    exports._finish = lambda *_: die()
elif point == "manifest":
    Path.rename = lambda *_: die()
elif point == "renamed":
    rename = Path.rename
    Path.rename = lambda *arguments: (rename(*arguments), die())
asyncio.run(exports.export_tenant(Settings.from_environment(), tenant, Path(folder), progress=told))
"""


@pytest.mark.parametrize(
    ("point", "is_there"),
    [
        ("entry", False),
        ("half a file", False),
        ("tables/audit_logs", False),
        ("events/", False),
        ("files/", False),
        ("no manifest", False),
        ("manifest", False),
        ("renamed", True),
    ],
)
async def test_an_export_that_is_killed_is_not_there_or_whole_and_the_next_one_is_whole(
    platform: Platform, settings: Settings, tmp_path: Path, point: str, is_there: bool
) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    before = await export_tenant(settings, tenant.id, tmp_path / "before")
    folder = tmp_path / "export"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, point, tenant.id, str(folder), env={**os.environ, **settings.environment()}
    )
    assert await process.wait() == -signal.SIGKILL
    assert exports_in(tmp_path) == ["export" if is_there else "export.partial"]
    if is_there:
        assert problems(folder) == []
        with pytest.raises(ConflictError, match="is there already"):
            await export_tenant(settings, tenant.id, folder)
        return
    after = await export_tenant(settings, tenant.id, folder)
    assert exports_in(tmp_path) == ["export"]
    assert problems(folder) == []
    assert contents(after) == contents(before)
    assert [row["action"] for row in lines(folder, AUDIT)].count("tenant.exported") == 3, "the killed one's too"


def exports_in(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("export*")]


async def test_a_second_export_to_the_same_folder_is_refused_while_one_is_under_way(
    platform: Platform, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    copy, refused = tenant_rows.TenantRows.copy, list[str]()

    async def meanwhile(self: tenant_rows.TenantRows, table: str, sink: tenant_rows.Sink, *, secrets: bool) -> int:
        with pytest.raises(ConflictError, match=r"another export to .* is under way"):
            await export_tenant(settings, tenant.id, tmp_path / "export")
        refused.append(table)
        return await copy(self, table, sink, secrets=secrets)

    monkeypatch.setattr(tenant_rows.TenantRows, "copy", meanwhile)
    await export_tenant(settings, tenant.id, tmp_path / "export")
    assert exports_in(tmp_path) == ["export"]
    assert (problems(tmp_path / "export"), len(refused) > 10) == ([], True)


async def test_what_is_changed_missing_or_too_much_is_found(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = (await lived_in(platform, settings)).tenant
    folder = tmp_path / "export"
    await export_tenant(settings, tenant.id, folder)
    damage(folder)
    assert sorted(problems(folder)) == [
        "files/2026/left.csv is not what was exported", "more is not part of the export",
        "tables/users.jsonl is missing",
    ]  # fmt: skip


def damage(folder: Path) -> None:
    (folder / "files/2026/left.csv").write_text("forged")
    (folder / "tables/users.jsonl").unlink()
    (folder / "more").touch()


@pytest.mark.parametrize("content", ["{}", "", "[]"])
def test_a_folder_without_a_manifest_is_no_export(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not an export"):
        problems(tmp_path)
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(InvalidRequestError, match="is not an export"):
        problems(tmp_path)


async def test_an_export_overwrites_nothing_and_needs_a_tenant(
    platform: Platform, settings: Settings, tmp_path: Path
) -> None:
    tenant = (await platform.new_tenant()).tenant
    with pytest.raises(ConflictError, match="is there already"):
        await export_tenant(settings, tenant.id, tmp_path)
    with pytest.raises(NotFoundError, match="no tenant"):
        await export_tenant(settings, TenantId(uuid7(1)), tmp_path / "nobody")
