"""Folders of our own, and whether another user can reach them; no permission of any other folder is ever changed."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def make_folder(path: Path, mode: int) -> None:
    """Create the folder, and those above it that are missing, with exactly this mode; leave existing ones alone."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        try:
            folder.mkdir(mode=mode)
        except FileExistsError:
            continue  # another process was faster; it set the mode
        folder.chmod(mode)  # mkdir's own mode is cut by the umask


def reachable_by_others(path: Path) -> bool:
    """Whether any user of the machine may pass through every existing folder down to ``path``."""
    existing = [folder for folder in (path, *path.parents) if folder.exists()]
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in existing)
