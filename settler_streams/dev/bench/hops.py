"""Where a job's time goes between request and result, by the broker's timestamps of its records.

A record's LogAppendTime is when it was appended; readers see it once its transaction has committed, so a hop's commit
counts into the next hop.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.dev.bench import log
from settler_streams.errors import StateError
from settler_streams.events import AttemptFinished, JobDecided, JobDispatched, JobFinished, JobRequested
from settler_streams.settings import Settings
from settler_streams.topology import full_name

CHAIN = (
    ("job-requests", JobRequested.event_type),
    ("job-decisions", JobDecided.event_type),
    ("job-dispatches", JobDispatched.event_type),
    ("pool-inputs", AttemptFinished.event_type),
    ("job-results", JobFinished.event_type),
)
"""What a job leaves in the log, in order."""
HOPS = ("client to log", "admission", "scheduler", "executor", "scheduler again", "log to client")


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as its client saw it: Unix milliseconds of the submission and of the result."""

    job_id: str
    submitted_ms: float
    answered_ms: float

    @property
    def latency_ms(self) -> float:
        """From the submission to the result."""
        return self.answered_ms - self.submitted_ms


class _Body(msgspec.Struct):
    job_id: str = ""


class _Event(msgspec.Struct):
    id: str
    type: str
    data: _Body


async def medians_ms(settings: Settings, jobs: Sequence[Seen]) -> dict[str, float]:
    """The median of each hop in milliseconds; the broker's timestamps are whole ones.

    Raises:
        StateError: a job has left no record of some kind.
    """
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Event)
    wanted = {job.job_id for job in jobs}
    stamps: list[dict[str, int]] = []
    for topic, event_type in CHAIN:
        found: dict[str, int] = {}
        async for chunk in log.read_all(Cluster.of(settings), full_name(settings.deployment, topic)):
            for record in chunk:
                event = decoder.decode(record.value)
                job_id = event.data.job_id or event.id
                if event.type == event_type and job_id in wanted:
                    found[job_id] = record.timestamp
        if missing := wanted - found.keys():
            raise StateError(f"{len(missing)} jobs have no {event_type}")
        stamps.append(found)
    times = [[job.submitted_ms, *(found[job.job_id] for found in stamps), job.answered_ms] for job in jobs]
    spent = ([after - before for before, after in pairwise(one)] for one in times)
    return {hop: round(statistics.median(of), 1) for hop, of in zip(HOPS, zip(*spent, strict=True), strict=True)}
