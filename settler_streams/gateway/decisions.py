"""Decisions: a request that submitted a job waits here for admission's answer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from settler_streams.errors import UnavailableError
from settler_streams.events import Envelope, JobDecided, Part
from settler_streams.ids import JobId, TenantId
from settler_streams.services.feed import TopicFeed
from settler_streams.settings import Settings

WAITING_MAX = 10_000
"""Submissions that wait at a time; a wait lasts two seconds at most."""
KEPT_MAX = 20_000
"""Decisions kept for submissions that are repeated before the database knows the job; a few hundred bytes each."""

Key = tuple[TenantId, JobId]


class JobDecisions:
    """Follows ``job-decisions`` from its end. A wait begins before the request is published, so none is missed."""

    def __init__(self, settings: Settings) -> None:
        self._waiting: dict[Key, list[asyncio.Future[JobDecided]]] = {}
        self._waiting_count = 0
        self._kept: OrderedDict[Key, JobDecided] = OrderedDict()
        self.feed = TopicFeed(settings, "job-decisions", self._decided, start="end")

    def get(self, tenant_id: TenantId, job_id: JobId) -> JobDecided | None:
        """A recent decision."""
        return self._kept.get((tenant_id, job_id))

    @contextmanager
    def expect(self, tenant_id: TenantId, job_id: JobId) -> Iterator[asyncio.Future[JobDecided]]:
        """A future of the job's decision, which is done already if that came a moment ago.

        A job is decided once: whoever looked with :meth:`get`, did something else and then waited would wait in vain
        for a decision that came in between.

        Raises:
            UnavailableError: too many submissions wait.
        """
        if self._waiting_count >= WAITING_MAX:
            raise UnavailableError(f"{WAITING_MAX} submissions wait for a decision; try again later")
        future: asyncio.Future[JobDecided] = asyncio.get_running_loop().create_future()
        key = (tenant_id, job_id)
        if (kept := self._kept.get(key)) is not None:
            future.set_result(kept)
        waiting = self._waiting.setdefault(key, [])
        waiting.append(future)
        self._waiting_count += 1
        try:
            yield future
        finally:
            self._waiting_count -= 1
            waiting.remove(future)
            if not waiting:
                self._waiting.pop(key, None)

    def _decided(self, event: Envelope[Part]) -> None:
        decision = event.data
        if not isinstance(decision, JobDecided):
            return
        key = (event.tenantid, JobId(decision.job_id))
        self._kept[key] = decision
        if len(self._kept) > KEPT_MAX:
            self._kept.popitem(last=False)
        for future in self._waiting.get(key, ()):
            if not future.done():
                future.set_result(decision)
