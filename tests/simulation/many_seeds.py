"""Many seeds, on every processor. A process of its own also spares the seeds the objects that other tests have left."""

from __future__ import annotations

import concurrent.futures
import gc
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import structlog

from tests.simulation.judge import judged
from tests.simulation.misfortunes import Fate
from tests.simulation.world import simulate

REPLAYED_EVERY = 100
"""Every so many seeds, one runs twice."""
CHUNK_SEEDS = 25
"""A few seconds' work."""


@dataclass
class Tally:
    """What some seeds have met, and the first of them that violates a guarantee."""

    virtual_s: float = 0.0
    injected: Counter[str] = field(default_factory=Counter)
    struck: Counter[tuple[str, Fate]] = field(default_factory=Counter)
    failed: tuple[int, list[str]] | None = None

    def add(self, other: Tally) -> None:
        """Take in what other seeds have met."""
        self.virtual_s += other.virtual_s
        self.injected += other.injected
        self.struck += other.struck
        self.failed = self.failed or other.failed


def quiet() -> None:
    """Of this process: thousands of faults would be logged, and what was imported be looked through for rubbish."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    gc.collect()
    gc.freeze()


def tally_of(seeds: range) -> Tally:
    """Run some seeds, up to the first that fails."""
    tally = Tally()
    for seed in seeds:
        world, found = judged(seed)
        if not found and seed % REPLAYED_EVERY == 0 and simulate(seed).broker.digest() != world.broker.digest():
            found = ["the seed does not repeat itself"]
        if found:
            tally.failed = (seed, found)
            return tally
        tally.injected += world.faults.injected
        tally.struck += world.faults.struck
        tally.injected["transaction timed out"] += world.broker.timed_out
        tally.virtual_s += world.virtual_s
    return tally


def tallies(seeds: range) -> Iterator[Tally]:
    """Tallies of all seeds, in their order."""
    chunks = [seeds[first : first + CHUNK_SEEDS] for first in range(0, len(seeds), CHUNK_SEEDS)]
    processes = min(os.cpu_count() or 1, len(chunks))
    if processes == 1:
        yield from map(tally_of, chunks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=quiet)
    try:
        yield from pool.map(tally_of, chunks)
    finally:
        pool.shutdown(cancel_futures=True)
