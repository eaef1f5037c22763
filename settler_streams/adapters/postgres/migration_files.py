"""The numbered files under ``schemas/postgres/``, and those under ``back/`` that undo them, of the same names."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from settler_streams.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

BACK = "back"
TENANT_SCOPE = "-- scope: tenant"
"""The first line of a migration that changes tables which tenants' schemas have too: it is run in each of them."""

_FILE_NAME = re.compile(r"^(\d{4})_[a-z0-9_]+\.sql$")


@dataclass(frozen=True)
class Migration:
    """One numbered file. The checksum is the SHA-256 of its bytes, in hexadecimal.

    ``back`` is what undoes it, None where nothing does. It is in no ledger: it may be mended after the migration was
    applied.
    """

    version: int
    name: str
    sql: str
    checksum: str
    back: str | None


def read_migrations(directory: Path) -> list[Migration]:
    """The migrations of a directory, in order of their numbers.

    Raises:
        ConfigurationError: a file name is not ``0001_some_words.sql``, a number is taken twice, or there is none.
    """
    files: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.match(path.name)
        if match is None:
            raise ConfigurationError(f"{path}: a migration is named like 0001_some_words.sql")
        if files and files[-1].version == int(match[1]):
            raise ConfigurationError(f"{path}: number {match[1]} is taken by {files[-1].name}")
        content = path.read_bytes()
        back = directory / BACK / path.name
        files.append(
            Migration(
                version=int(match[1]),
                name=path.name,
                sql=content.decode(),
                checksum=hashlib.sha256(content).hexdigest(),
                back=back.read_text(encoding="utf-8") if back.is_file() else None,
            )
        )
    if not files:
        raise ConfigurationError(f"{directory}: no migrations found")
    return files
