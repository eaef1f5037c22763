"""``settler tenants export``, ``verify-export``, ``restore-backup``: all that is held of a tenant, in plain files."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click
import msgspec

from settler_streams.cli.output import EXIT_DIFFERS, flag, json_flag, print_json, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import ACTOR, tenant_id_of
from settler_streams.services import backups, exports

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("tenant")
@click.argument("folder", type=_FOLDER)
@flag("--secrets", env="SETTLER_EXPORT_SECRETS", is_flag=True, help="With the hashes of passwords and keys: a backup.")
@state_dir_flag()
@json_flag()
def export(tenant: str, folder: Path, secrets: bool, state_dir: Path, as_json: bool) -> None:
    """Write all that is held of TENANT to FOLDER, which is made: rows, events and files, with a manifest."""
    tenant_id = tenant_id_of(tenant)
    settings = settings_of(state_dir)
    manifest = asyncio.run(
        exports.export_tenant(
            settings,
            tenant_id,
            folder,
            secrets=secrets,
            actor=ACTOR,
            progress=lambda name: click.echo(name, err=True),
        )
    )
    if as_json:
        print_json(msgspec.to_builtins(manifest))
    else:
        size = sum(file.size for file in manifest.files)
        click.echo(f"{len(manifest.files)} files, {size} bytes in {folder}")


@click.command(name="verify-export")
@click.argument("folder", type=_FOLDER)
@json_flag()
def verify_export(folder: Path, as_json: bool) -> None:
    """Compare an export with its manifest; exit code 3 when something is missing, changed or too much."""
    found = exports.problems(folder)
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(found) or "whole")
    if found:
        raise SystemExit(EXIT_DIFFERS)


@click.command(name="restore-backup")
@click.argument("folder", type=_FOLDER)
@state_dir_flag()
@json_flag()
def restore_backup(folder: Path, state_dir: Path, as_json: bool) -> None:
    """Put the tenant of an export with --secrets back, where it is gone: rows and files, under its id.

    `restore` undoes a deletion; this undoes a loss, as of a database. What was erased stays erased. Killed half-way it
    is run again. Events are not sent anew.
    """
    restored = asyncio.run(
        backups.restore_tenant(
            settings_of(state_dir), folder, actor=ACTOR, progress=lambda name: click.echo(name, err=True)
        )
    )
    if as_json:
        print_json(asdict(restored))
    else:
        click.echo(
            f"tenant {restored.tenant_id}: {restored.rows} rows, {restored.files} files, version {restored.version}"
        )
