"""Where a step's time goes: chosen callables are timed, each without what it calls that is timed itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_now = time.perf_counter_ns
CALIBRATION_CALLS = 200_000


@dataclass(frozen=True, slots=True)
class Place:
    """A callable: ``owner`` is a class or module, ``name`` an attribute of it. ``phase`` is what the table calls it."""

    phase: str
    owner: Any
    name: str


class Phases:
    """Own time in nanoseconds and calls, per phase. The cost of the timing itself is measured and taken off."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        self.own_ns: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.gone: list[str] = []
        """Places that no longer exist, so their time is in their callers'."""
        self.gc_ns = 0
        self._inner: list[int] = [0]

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time the places while inside."""
        originals: list[tuple[Place, Any]] = []
        for place in self._places:
            original = place.owner.__dict__.get(place.name)
            if original is None:
                self.gone.append(f"{place.owner.__name__}.{place.name}")
                continue
            originals.append((place, original))
            setattr(place.owner, place.name, self._timed(place.phase, original))
        gc.callbacks.append(self._on_gc)
        try:
            yield
        finally:
            gc.callbacks.remove(self._on_gc)
            for place, original in originals:
                setattr(place.owner, place.name, original)

    def corrected_ns(self) -> dict[str, int]:
        """Own time per phase, less what timing its calls cost it."""
        cost = self._cost_ns()
        return {phase: max(0, own - round(self.calls[phase] * cost)) for phase, own in self.own_ns.items()}

    def timing_cost_ns(self) -> int:
        """What the timing of all calls has cost, in and around them."""
        return round(2 * self._cost_ns() * sum(self.calls.values()))

    def _timed(self, phase: str, call: Any) -> Callable[..., Any]:
        self.own_ns.setdefault(phase, 0)
        self.calls.setdefault(phase, 0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner = self._inner
            inner.append(0)
            began = _now()
            try:
                result = call(*args, **kwargs)
            finally:
                spent = _now() - began
                own = spent - inner.pop()
                inner[-1] += spent
                self.own_ns[phase] = self.own_ns.get(phase, 0) + own
                self.calls[phase] = self.calls.get(phase, 0) + 1
            return _Generator(self, phase, result) if isinstance(result, Iterator) else result

        return timed

    def _cost_ns(self) -> float:
        """Of one timed call, as seen from inside; about as much again is spent around it."""
        probe = Phases([])
        timed = probe._timed("probe", lambda: None)
        for _ in range(CALIBRATION_CALLS):
            timed()
        return probe.own_ns["probe"] / CALIBRATION_CALLS

    def _on_gc(self, phase: str, _details: dict[str, int]) -> None:
        self.gc_ns += -_now() if phase == "start" else _now()


class _Generator:
    """A generator whose every turn is timed."""

    def __init__(self, phases: Phases, phase: str, generator: Iterator[Any]) -> None:
        self._next = phases._timed(phase, generator.__next__)  # noqa: SLF001 - of this module

    def __iter__(self) -> _Generator:
        return self

    def __next__(self) -> Any:
        return self._next()
