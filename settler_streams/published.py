"""Where the published contract lies: ``topology/`` and ``schemas/``, beside the package or inside a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "_published"

ROOT: Path = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
TOPOLOGY: Path = ROOT / "topology"
SCHEMAS: Path = ROOT / "schemas"
MIGRATIONS: Path = SCHEMAS / "postgres"
