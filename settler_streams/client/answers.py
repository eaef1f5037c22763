"""Answers that jobs wait for, and those that have come but were not yet asked for; both bounded."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Generic, TypeVar

from settler_streams.ids import JobId, TenantId

EXPECTED_MAX = 100_000
"""Jobs one transport waits for at a time; of more, the oldest are looked up in the log when someone asks."""
KEPT_MAX = 10_000
"""Answers kept for whoever asks later; an older one is looked up in the log again."""

Key = tuple[TenantId, JobId]
"""Each tenant chooses its own job ids, so two may choose the same."""

A = TypeVar("A")


class Answers(Generic[A]):
    """The answers of one kind, by tenant and job."""

    def __init__(self) -> None:
        self._expected: dict[Key, asyncio.Future[A | None]] = {}
        self._kept: OrderedDict[Key, A] = OrderedDict()

    def expect(self, tenant_id: TenantId, job_id: JobId) -> bool:
        """The job is about to be submitted. Whoever waits for one that is pushed out here goes to the log instead.

        Returns whether it was not expected before; an answer that was is another call's to forget.
        """
        key = (tenant_id, job_id)
        if key in self._expected or key in self._kept:
            return False
        if len(self._expected) >= EXPECTED_MAX:
            self.forget(*next(iter(self._expected)))
        self._expected[key] = asyncio.get_running_loop().create_future()
        return True

    def settle(self, tenant_id: TenantId, job_id: JobId, answer: A) -> None:
        """The answer has come."""
        key = (tenant_id, job_id)
        future = self._expected.pop(key, None)
        if future is None:
            return
        if not future.done():
            future.set_result(answer)
        self._kept[key] = answer
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)

    def forget(self, tenant_id: TenantId, job_id: JobId) -> None:
        """No answer will come here; whoever waits already looks it up."""
        future = self._expected.pop((tenant_id, job_id), None)
        if future is not None and not future.done():
            future.set_result(None)

    def find(self, tenant_id: TenantId, job_id: JobId) -> asyncio.Future[A | None] | None:
        """A future of the answer, done if it has come; ``None`` when this transport knows nothing of the job.

        The future's result is ``None`` when the answer is forgotten.
        """
        key = (tenant_id, job_id)
        if key in self._kept:
            future: asyncio.Future[A | None] = asyncio.get_running_loop().create_future()
            future.set_result(self._kept[key])
            return future
        return self._expected.get(key)
