"""The folder of a tenant's record sets, as a whole: how many files it holds, and its removal."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from settler_streams.ids import TenantId, canonical_tenant

if TYPE_CHECKING:
    from pathlib import Path


def files_in(record_sets_dir: Path, tenant_id: TenantId) -> int:
    """How many files there are below the tenant's folder; a symbolic link is one, wherever it leads."""
    folder = _folder(record_sets_dir, tenant_id)
    if folder.is_symlink():
        return 1
    found = 0
    for path, folders, files in os.walk(folder):
        found += len(files) + sum(os.path.islink(os.path.join(path, name)) for name in folders)  # noqa: PTH118, PTH114
    return found


def remove(record_sets_dir: Path, tenant_id: TenantId) -> None:
    """Remove the folder with all that is in it, if it is there. A symbolic link goes, what it leads to stays."""
    folder = _folder(record_sets_dir, tenant_id)
    if folder.is_symlink():
        folder.unlink()
    while folder.exists():
        # Who removes it at the same time takes files from under us; each time there are fewer.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def is_there(record_sets_dir: Path, tenant_id: TenantId) -> bool:
    """Whether there is such a folder, or a link in its place."""
    return os.path.lexists(_folder(record_sets_dir, tenant_id))


def _folder(record_sets_dir: Path, tenant_id: TenantId) -> Path:
    return record_sets_dir / canonical_tenant(tenant_id)
