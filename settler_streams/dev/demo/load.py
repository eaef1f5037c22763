"""The load: each tenant submits at its own pace through the SDK, and notes what came of each job."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from settler_streams.client import SettlerClient
from settler_streams.dev.demo.scenario import MATCH_RULES, SETS_PER_TENANT, Load
from settler_streams.events import FileRecords, JobFinished
from settler_streams.ids import TenantId

ANSWER_TIMEOUT_S = 180.0
"""Longest wait for a job's answer: many times the length of the demo."""


@dataclass
class Tally:
    """What one tenant has seen so far. Latencies run from the submission to the result, in seconds."""

    load: Load
    tenant: TenantId
    submitted: int = 0
    admitted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    results: list[JobFinished] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Jobs with a result."""
        return len(self.results)

    @property
    def open(self) -> int:
        """Jobs that wait for their decision or their result."""
        return self.submitted - self.finished - sum(self.rejected.values())


async def submit_all(client: SettlerClient, tally: Tally) -> None:
    """Submit the tenant's jobs at its pace, and wait for every answer."""
    load, jobs = tally.load, []
    started = time.monotonic()
    kinds = ["reconciliation"] * load.jobs + ["reconciliation-preview"] * load.preview_jobs
    for number, kind in enumerate(kinds):
        await asyncio.sleep(max(0.0, started + number / load.per_second - time.monotonic()))
        jobs.append(asyncio.create_task(_one(client, number, kind, tally)))
    await asyncio.gather(*jobs)


async def _one(client: SettlerClient, number: int, kind: str, tally: Tally) -> None:
    """Submit one job and wait for its answer; the next one does not wait, or a slow broker would calm the flood."""
    began = time.monotonic()
    job = await client.submit(
        left=_records("left", number), right=_records("right", number), rules=MATCH_RULES, kind=kind
    )
    tally.submitted += 1
    decision = await job.decision(ANSWER_TIMEOUT_S)
    if not decision.admitted:
        tally.rejected[str(decision.reason)] += 1
        return
    tally.admitted += 1
    tally.results.append(await job.result(ANSWER_TIMEOUT_S))
    tally.latencies_s.append(time.monotonic() - began)


def _records(side: str, number: int) -> FileRecords:
    return FileRecords(path=f"demo-{number % SETS_PER_TENANT}/{side}.csv", format="csv")
