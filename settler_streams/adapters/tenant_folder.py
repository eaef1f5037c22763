"""The folder of a tenant's record sets, as a whole: how many files it holds, and its removal.

With it goes what a restore that was killed has left: the files lie in a folder of their own until the rows are there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from settler_streams.ids import TenantId, canonical_tenant

if TYPE_CHECKING:
    from pathlib import Path


def folder_of(record_sets_dir: Path, tenant_id: TenantId) -> Path:
    """Where a tenant's record sets are."""
    return record_sets_dir / canonical_tenant(tenant_id)


def restoring(record_sets_dir: Path, tenant_id: TenantId) -> Path:
    """Where they are while they are being restored."""
    return record_sets_dir / f"{canonical_tenant(tenant_id)}.restoring"


def files_in(record_sets_dir: Path, tenant_id: TenantId) -> int:
    """How many files there are below the tenant's folders; a symbolic link is one, wherever it leads."""
    found = 0
    for top in _folders(record_sets_dir, tenant_id):
        if top.is_symlink():
            found += 1
            continue
        for path, folders, files in os.walk(top):
            found += len(files)
            found += sum(os.path.islink(os.path.join(path, name)) for name in folders)  # noqa: PTH118, PTH114
    return found


def remove(record_sets_dir: Path, tenant_id: TenantId) -> None:
    """Remove the folders with all that is in them. A symbolic link goes, what it leads to stays."""
    for folder in _folders(record_sets_dir, tenant_id):
        if folder.is_symlink():
            folder.unlink()
        while folder.exists():
            # Who removes it at the same time takes files from under us; each time there are fewer.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)


def is_there(record_sets_dir: Path, tenant_id: TenantId) -> bool:
    """Whether there is such a folder, or a link in its place."""
    return any(os.path.lexists(folder) for folder in _folders(record_sets_dir, tenant_id))


def _folders(record_sets_dir: Path, tenant_id: TenantId) -> tuple[Path, Path]:
    return folder_of(record_sets_dir, tenant_id), restoring(record_sets_dir, tenant_id)
