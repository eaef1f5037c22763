"""How workers have ended: whoever fails says why, and only for a reason that a fault gives it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

GIVEN = re.compile(r"(FencedError|UnavailableError)\(|StateError\(.*stored format")
"""Another owner took over; a service did not answer; the state was written by a later version, after an upgrade."""

FAILURES = ("worker failed", "worker did not start")
STANDSTILLS = ("worker stalled", "the event loop stands still")


class _Line(msgspec.Struct):
    event: str = ""
    error: str = ""


def wrong_ends(folder: Path) -> Iterator[str]:
    """Failures of workers, by the logs in ``folder``, that no fault explains: an internal error, state that contradicts
    the log, a standstill."""
    decoder = msgspec.json.Decoder(_Line)
    for log in sorted(folder.glob("*.log")):
        for text in log.read_bytes().splitlines():
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError:
                continue  # a start, a traceback
            if line.event in STANDSTILLS or (line.event in FAILURES and GIVEN.match(line.error) is None):
                yield f"{log.name}: {line.event}: {line.error[:200]}"
