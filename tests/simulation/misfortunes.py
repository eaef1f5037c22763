"""Which request meets which fault: drawn from the seed, counted by kind, and over when the storm is."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass
from random import Random


class Fate(enum.Enum):
    """What can happen to one request on its way to the broker and back."""

    CRASH_BEFORE = "crash before the request"
    CRASH_AFTER = "crash before the answer"
    FREEZE_BEFORE = "zombie before the request"
    FREEZE_AFTER = "zombie before the answer"
    SLOW = "answer delayed"
    RETRIED = "retriable error"
    REFUSED = "produce refused"
    LOST_REQUEST = "commit lost on its way"
    LOST_ANSWER = "commit applied, answer lost"
    LATE_REQUEST = "commit applied after it was given up"
    FAILED = "broker unavailable"


_ANYWHERE = (
    Fate.CRASH_BEFORE,
    Fate.CRASH_AFTER,
    Fate.FREEZE_BEFORE,
    Fate.FREEZE_AFTER,
    Fate.SLOW,
    Fate.RETRIED,
)
_ELSEWHERE = {
    "produce": (*_ANYWHERE, Fate.REFUSED, Fate.REFUSED),
    "commit": (*_ANYWHERE, Fate.LOST_REQUEST, Fate.LOST_ANSWER, Fate.LATE_REQUEST),
    "load": (*_ANYWHERE, Fate.FAILED),
    "fetch": (*_ANYWHERE, Fate.FAILED),
    "heartbeat": (*_ANYWHERE, Fate.FAILED),
}

HAZARD = {
    "commit": 0.12,
    "offsets": 0.05,
    "produce": 0.02,
    "init": 0.05,
    "load": 0.01,
    "fetch": 0.02,
    "heartbeat": 0.05,
}
"""How likely a request of each kind meets a fault; a transaction has one commit and several produces."""
HAZARD_ELSEWHERE = 0.008
FAULTS_MAX = 8
"""Request faults in one seed: more would leave no time between them for the damage to show."""


@dataclass
class Faults:
    """The faults of one seed. ``raging`` ends with the storm; ``injected`` counts them by kind, ``struck`` those of
    requests by the kind of the request."""

    random: Random
    raging: bool = True
    left: int = FAULTS_MAX

    def __post_init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.struck: Counter[tuple[str, Fate]] = Counter()
        self._intensity = self.random.choice((0.0, 0.3, 1.0, 1.0, 2.0))

    def fate(self, kind: str) -> Fate | None:
        """What happens to a request of ``kind``; mostly nothing."""
        if not self.raging or self.left == 0:
            return None
        if self.random.random() >= HAZARD.get(kind, HAZARD_ELSEWHERE) * self._intensity:
            return None
        self.left -= 1
        fate = self.random.choice(_ELSEWHERE.get(kind, _ANYWHERE))
        self.count(fate.value)
        self.struck[kind, fate] += 1
        return fate

    def count(self, kind: str, times: int = 1) -> None:
        """Note a fault that something else injects."""
        self.injected[kind] += times
