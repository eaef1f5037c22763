"""The watch: follows the committed log through a round, so that waits have facts to look at."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.settings import Settings
from tests.chaos.pace import elapse

TICK = b'"settler.clock.tick.v1"'
CALL_S_MAX = 10.0
"""Longest wait for one answer of the broker; while it is down the look is repeated."""
Place = tuple[str, int]


class Watch:
    """Reads the inputs of every fold, and remembers how far they go and which jobs were decided and finished."""

    def __init__(self, settings: Settings, partitions: Mapping[str, int], folds: Mapping[str, tuple[str, ...]]) -> None:
        self._settings = settings
        self._folds = folds
        self._partitions = {name: partitions[name] for name in {t for inputs in folds.values() for t in inputs}}
        self._prefix = f"{settings.deployment}."
        self._task: asyncio.Task[None] | None = None
        self.decided: dict[str, bool] = {}
        self.finished: set[str] = set()
        self.decisions: Counter[int] = Counter()
        self.last: dict[Place, int] = {}
        """The offset of the last record, ticks aside, by topic and partition."""
        self.ticks: dict[Place, int] = {}

    async def start(self) -> None:
        """Begin at the beginning."""
        tps = [TopicPartition(self._prefix + name, n) for name, count in self._partitions.items() for n in range(count)]
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=self._settings.kafka_bootstrap_servers, isolation_level="read_committed",
            enable_auto_commit=False, auto_offset_reset="earliest", retry_backoff_ms=200,
        )  # fmt: skip
        await consumer.start()
        consumer.assign(tps)
        self._task = asyncio.create_task(self._follow(consumer))

    async def stop(self) -> None:
        """End."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self, consumer: aiokafka.AIOKafkaConsumer) -> None:
        try:
            while True:
                try:
                    batches = await consumer.getmany(timeout_ms=200, max_records=5_000)
                except KafkaError:
                    await elapse(0.5)
                    continue
                for tp, records in batches.items():
                    self._take(tp.topic.removeprefix(self._prefix), tp.partition, records)
        finally:
            await consumer.stop()

    def _take(self, topic: str, partition: int, records: list[aiokafka.ConsumerRecord]) -> None:
        for record in records:
            if record.value is not None and TICK in record.value:
                self.ticks[topic, partition] = record.offset
                continue
            self.last[topic, partition] = record.offset
            if topic == "job-decisions":
                body = json.loads(record.value)["data"]
                self.decided[body["job_id"]] = body["admitted"]
                self.decisions[partition] += 1
            elif topic == "job-results":
                self.finished.add(json.loads(record.value)["data"]["job_id"])

    @property
    def failed(self) -> BaseException | None:
        """Why it no longer follows, if so."""
        return self._task.exception() if self._task is not None and self._task.done() else None

    def open_jobs(self) -> set[str]:
        """Admitted jobs without a result."""
        return {job for job, admitted in self.decided.items() if admitted} - self.finished

    async def behind(self, marks: Mapping[Place, int]) -> dict[str, int]:
        """How many of these records each role has not committed yet: by Kafka's offsets, from the outside."""
        left: dict[str, int] = defaultdict(int)
        admin = AIOKafkaAdminClient(bootstrap_servers=self._settings.kafka_bootstrap_servers)
        async with asyncio.timeout(CALL_S_MAX):
            await admin.start()
            try:
                for role, inputs in self._folds.items():
                    offsets = await admin.list_consumer_group_offsets(self._prefix + role)
                    for (topic, partition), offset in marks.items():
                        if topic in inputs:
                            stored = offsets.get(TopicPartition(self._prefix + topic, partition))
                            left[role] += max(0, offset + 1 - (stored.offset if stored is not None else 0))
            finally:
                await admin.close()
        return dict(left)
