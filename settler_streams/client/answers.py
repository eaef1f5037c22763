"""Answers that jobs wait for, and those that have come but were not yet asked for; both bounded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Generic, TypeVar

from settler_streams.ids import JobId

EXPECTED_MAX = 100_000
"""Jobs one transport waits for at a time; of more, the oldest are looked up in the log when someone asks."""
KEPT_MAX = 10_000
"""Answers kept for whoever asks later; an older one is looked up in the log again."""

A = TypeVar("A")


class Answers(Generic[A]):
    """The answers of one kind, by job."""

    def __init__(self) -> None:
        self._expected: dict[JobId, asyncio.Future[A]] = {}
        self._kept: OrderedDict[JobId, A] = OrderedDict()

    def expect(self, job_id: JobId) -> None:
        """The job is about to be submitted. Whoever waits for one that is pushed out here goes to the log instead."""
        if job_id in self._expected or job_id in self._kept:
            return
        if len(self._expected) >= EXPECTED_MAX:
            del self._expected[next(iter(self._expected))]
        self._expected[job_id] = asyncio.get_running_loop().create_future()

    def settle(self, job_id: JobId, answer: A) -> None:
        """The answer has come."""
        future = self._expected.pop(job_id, None)
        if future is None:
            return
        if not future.done():
            future.set_result(answer)
        self._kept[job_id] = answer
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def forget(self, job_id: JobId) -> None:
        """No answer will come."""
        self._expected.pop(job_id, None)

    def find(self, job_id: JobId) -> asyncio.Future[A] | None:
        """A future of the answer, done if it has come; ``None`` when this transport knows nothing of the job."""
        if job_id in self._kept:
            future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
            future.set_result(self._kept[job_id])
            return future
        return self._expected.get(job_id)
