"""A partition that stands still for a while: all verdicts are those of a platform on which nothing ever stops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from settler_streams.core.noise import GRID, STANDSTILL_MS
from settler_streams.events import TenantNoisy, TenantQuiet
from settler_streams.ids import PLATFORM
from tests.core.harness import START_MS
from tests.core.test_noise import PARTITIONS, ROOT, TENANTS, TICK, done, new_detector, new_partition, stored


@dataclass
class Platform:
    """All partitions and the detector, second by second. A partition that stands still finds its inputs later, one
    topic after another, as a step does; one without ticks goes on reading the rest."""

    still: dict[int, tuple[str, int, int]]
    """Of a partition: what stops there, from which second, and at which it goes on."""

    def __post_init__(self):
        self.folds = [new_partition(number) for number in range(PARTITIONS)]
        self.detector = new_detector()
        self.waiting = [{"stored": [], "done": [], "tick": []} for _ in range(PARTITIONS)]

    def live(self, seconds, usage):
        """Verdicts, with all that they say."""
        for second in range(seconds):
            now_ms = START_MS + 1_000 * second
            for number, inputs in enumerate(self.waiting):
                inputs["stored"].append((now_ms, stored(1), TENANTS[number]))
                for tenant, seconds_of_work in usage(number, second).items():
                    inputs["done"].append((now_ms, done(now_ms, seconds_of_work * 1_000_000), tenant))
                inputs["tick"].append((now_ms + 1, TICK, PLATFORM))
                self._read(number, second)
            self.detector.now_ms = now_ms + 900
            self.detector.feed(TICK)
        kinds = (TenantNoisy, TenantQuiet)
        return [(e.tenant, e.data) for o in self.detector.outcomes for e in o.emits if isinstance(e.data, kinds)]

    def _read(self, number, second):
        what, since, until = self.still.get(number, ("worker", 0, 0))
        fold = self.folds[number]
        for topic, records in self.waiting[number].items():
            if since <= second < until and what in ("worker", topic):
                continue
            if second == until and what == "worker":
                fold.restart()
                self.detector.restart()
            for at_ms, body, tenant in records:
                fold.now_ms = max(fold.now_ms, at_ms)
                for emit in fold.feed(body, tenant, key=ROOT, time_ms=at_ms):
                    self.detector.now_ms = max(self.detector.now_ms, fold.now_ms)
                    self.detector.feed(emit.data)
            records.clear()


def busy(number, second):
    """The loud one lives in partition 2, and pauses once; its partition's others keep the average up."""
    return {
        0: {TENANTS[0]: 20},
        1: {TENANTS[1]: 35, TENANTS[3]: 15},
        2: {TENANTS[4]: 15} | ({} if 40 <= second < 55 else {TENANTS[2]: 160}),
    }[number]


@pytest.mark.parametrize("what", ["worker", "tick"])
@pytest.mark.parametrize("number", range(PARTITIONS))
@pytest.mark.parametrize(("since", "until"), [(11, 14), (12, 30), (15, 50), (38, 60)])
def test_a_partition_that_stands_still_changes_no_verdict(what, number, since, until):
    undisturbed = Platform({}).live(90, busy)
    assert [type(body) for _, body in undisturbed] == [TenantNoisy, TenantQuiet, TenantNoisy]
    assert {tenant for tenant, _ in undisturbed} == {TENANTS[2]}
    disturbed = Platform({number: (what, since, until)})
    assert disturbed.live(90, busy) == undisturbed
    assert len(disturbed.detector.stored()) < 40, "nothing is kept that waits for nobody"


def test_a_partition_that_is_gone_for_good_stops_no_detection():
    platform = Platform({0: ("worker", 10, 10_000)})
    verdicts = platform.live(120, busy)
    assert (TENANTS[2], TenantQuiet) in [(tenant, type(body)) for tenant, body in verdicts]
    kept = {int(key.split("/")[1]) for key in platform.detector.stored() if key.startswith("partial/")}
    late = (STANDSTILL_MS + GRID.lateness_ms) // GRID.width_ms
    assert len(kept) <= late + 2
    assert platform.detector.state["judged/"].window >= platform.detector.now_ms // GRID.width_ms - late - 2
