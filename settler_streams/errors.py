"""The error tree: every error says what happened, what to do next, and how the stream goes on after it.

The disposition is part of the type, so a caller never guesses:

========== =====================================================================================
RETRY      the same call may succeed later; nothing was changed
REFUSE     the caller asked for something that cannot be; the caller has to change the request
DEAD_LETTER the record can never be processed; it goes to the dead letters and the partition goes on
HALT       the worker cannot go on without risking a wrong result; it stops loudly
========== =====================================================================================
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Disposition(enum.Enum):
    """What happens next to the work that met the error."""

    RETRY = "retry"
    REFUSE = "refuse"
    DEAD_LETTER = "dead-letter"
    HALT = "halt"


class SettlerError(Exception):
    """The root: catch it to catch everything that this package raises on purpose."""

    disposition: ClassVar[Disposition] = Disposition.HALT


class ConfigurationError(SettlerError):
    """A setting, topology file or environment is wrong; the process refuses to start."""

    disposition = Disposition.HALT


class InvalidRequestError(SettlerError):
    """The caller's input is not acceptable; the message names the field and the rule."""

    disposition = Disposition.REFUSE


class OutsideTenantError(InvalidRequestError):
    """A path leads, or could lead, out of the tenant's own directory. The message never says what lies there."""


class NotFoundError(SettlerError):
    """The named thing does not exist for this tenant."""

    disposition = Disposition.REFUSE


class ConflictError(SettlerError):
    """The change contradicts what is stored (a taken slug, a stale version)."""

    disposition = Disposition.REFUSE


class UnavailableError(SettlerError):
    """A service that is needed did not answer within its deadline; try again later."""

    disposition = Disposition.RETRY


class RecordError(SettlerError):
    """A record that can never be processed. ``reason`` is the stable, machine-readable class of the failure."""

    disposition = Disposition.DEAD_LETTER

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        """Two arguments, so that the error survives the way back from a child process."""
        return type(self), (self.reason, self.detail)


class FencedError(SettlerError):
    """Another owner has taken over this fold; what this process was doing has been aborted."""

    disposition = Disposition.HALT


class StalledError(SettlerError):
    """Work waits and nothing moves, for longer than any single wait may last; only a new process can be expected to."""

    disposition = Disposition.HALT


class StateError(SettlerError):
    """Stored state or a stored position contradicts the log; processing on would give wrong results."""

    disposition = Disposition.HALT
