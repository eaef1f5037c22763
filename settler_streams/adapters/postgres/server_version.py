"""Which servers keep what row-level security promises: those without a known way around it."""

from __future__ import annotations

from typing import Final

from settler_streams.errors import ConfigurationError

_FIRST_SAFE_MINOR: Final = {13: 22, 14: 19, 15: 14, 16: 10, 17: 6}
"""Major to the first minor in which all of these are fixed; later majors never had them.

* CVE-2023-2455: policies of another role after inlining (11.20, 12.15, 13.11, 14.8, 15.3)
* CVE-2023-39418: MERGE passes over policies of UPDATE and SELECT (15.4)
* CVE-2024-10976: a prepared plan keeps the policies of another role, below a sub-query (13.17, 14.14, 15.9, 16.5, 17.1)
* CVE-2025-8713: optimiser statistics show rows that policies hide (13.22, 14.19, 15.14, 16.10, 17.6)

Source: https://www.postgresql.org/support/security/, one page for each.
"""


def refuse_unsafe(version_number: int) -> None:
    """Args: ``version_number`` as ``server_version_num`` says it, 170006 for 17.6.

    Raises:
        ConfigurationError: a known way around row-level security is open in this version.
    """
    major, minor = divmod(version_number, 10_000)
    oldest = min(_FIRST_SAFE_MINOR)
    if major < oldest:
        raise ConfigurationError(
            f"PostgreSQL {major} has known ways around row-level security and no fixes any more; "
            f"upgrade to {max(_FIRST_SAFE_MINOR)}.{_FIRST_SAFE_MINOR[max(_FIRST_SAFE_MINOR)]} or later"
        )
    if minor < (safe := _FIRST_SAFE_MINOR.get(major, 0)):
        raise ConfigurationError(
            f"PostgreSQL {major}.{minor} has known ways around row-level security "
            f"(CVE-2025-8713 or an older one); upgrade to {major}.{safe} or later"
        )
