"""Read a file of a tenant's own directory, and nothing else.

A path is resolved first and opened second, and between the two an attacker could swap a directory for a symbolic
link. So the resolved path, which holds no link, is walked from the tenant's directory one component at a time with
``openat`` and ``O_NOFOLLOW``: a link that appeared meanwhile fails the walk instead of being followed. This works on
Linux and macOS alike.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from settler_streams.errors import InvalidRequestError, OutsideTenantError
from settler_streams.ids import canonical_tenant

if TYPE_CHECKING:
    from settler_streams.ids import TenantId

FILE_BYTES_MAX = 128 * 1024 * 1024
"""Twelve times a set of 100,000 rows; the file is held in memory while it is parsed."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the open of a FIFO would wait for its writer for ever.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def read_tenant_file(tenant: TenantId, record_sets_dir: Path, path: str, *, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    """The content of ``<record_sets_dir>/<tenant>/<path>``.

    Symbolic links are followed as long as they stay inside the tenant's directory, which must not be a link itself.

    Raises:
        OutsideTenantError: the path is absolute, climbs with ``..``, holds a NUL, or leaves the tenant's directory.
        InvalidRequestError: it does not name a regular file, or the file is larger than ``bytes_max``. The message
            repeats the path as it was given and never says what lies outside.
    """
    relative = _checked(path)
    try:
        root = Path(os.path.realpath(record_sets_dir)) / canonical_tenant(tenant)
        # strict: a missing file or a loop of links fails here.
        resolved = Path(os.path.realpath(root / relative, strict=True))
        if not resolved.is_relative_to(root):
            raise OutsideTenantError(f"path {path!r} is not inside the tenant's directory")
        descriptor = _open_below(root, resolved.relative_to(root))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"path {path!r} cannot be opened in the tenant's directory") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequestError(f"path {path!r} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        # Reads one byte more than allowed rather than trusting a size that can change.
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise InvalidRequestError(f"path {path!r} is larger than {bytes_max} bytes")
    return content


def _checked(path: str) -> PurePosixPath:
    relative = PurePosixPath(path)
    if not path or "\0" in path or relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise OutsideTenantError(f"path {path!r} is not a relative path below the tenant's directory")
    return relative


def _open_below(root: Path, relative: Path) -> int:
    """Open a link-free path; the caller owns the descriptor."""
    *folders, name = relative.parts or (".",)
    directory = os.open(root, _DIRECTORY)
    try:
        for folder in folders:
            child = os.open(folder, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = child
        return os.open(name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
