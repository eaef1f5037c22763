"""The load that comes over HTTP: one tenant with an API key, each job under an idempotency key until it is answered."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections import Counter

import httpx

from tests.chaos import made_events
from tests.chaos.pace import elapse

TRIES_MAX = 40
PAUSE_S = 0.5
"""Between two tries of the same request; forty of them outlast every fault of a round."""
AT_ONCE_MAX = 40


class HttpLoad:
    """Submits ``per_s`` jobs a second. ``told`` holds what it was told about each job that was decided."""

    def __init__(self, url: str, key: str, per_s: float, seed: int) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._per_s = per_s
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.told: dict[str, bool] = {}
        self.answers: Counter[str] = Counter()

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop; then every job still gets its answer, or its tries are used up."""
        tasks: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=10) as client:
            while not await elapse(1 / self._per_s, stop):
                if len(tasks) < AT_ONCE_MAX:
                    task = asyncio.create_task(self._submit(client))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
            if tasks:
                await asyncio.wait(tasks)

    async def _submit(self, client: httpx.AsyncClient) -> None:
        body = made_events.request_body(self._chance)
        key = made_events.event_id(self._chance, dt.datetime.now(dt.UTC))
        for _ in range(TRIES_MAX):
            try:
                answer = await client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
            else:
                self.answers[str(answer.status_code)] += 1
                if answer.headers.get("content-type", "").startswith("application/") and (
                    decision := answer.json().get("decision")
                ):
                    self.told[answer.json()["job_id"]] = decision["admitted"]
                    return
            await elapse(PAUSE_S)
