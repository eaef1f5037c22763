"""What a step sends: records collected per topic and partition, sent as whole batches, every one of them awaited."""

from __future__ import annotations

import asyncio
from typing import Any

import aiokafka
from aiokafka.errors import IllegalOperation, KafkaError

Headers = list[tuple[str, bytes]]


class Lane:
    """The records of one topic-partition, in the batches that they travel in.

    A batch is filled as its own ``append`` would do it, but for what that does for those who have no bytes yet: with
    that, a record would cost twice as much.
    """

    __slots__ = ("_append", "_batch", "_batches", "_producer", "_topic")

    def __init__(self, topic: str, producer: aiokafka.AIOKafkaProducer, batches: list[Any]) -> None:
        self._topic = topic
        self._producer = producer
        self._batches = batches
        self._begin()

    def add(self, key: bytes | None, value: bytes | None, headers: Headers) -> None:
        """Collect one record. ``value`` ``None`` is a tombstone.

        Raises:
            ValueError: no batch is large enough for it.
        """
        number = self._batch._relative_offset  # noqa: SLF001 - see above
        if self._append(number, None, key, value, headers) is None:
            self._begin()
            number = 0
            if self._append(number, None, key, value, headers) is None:
                raise ValueError(f"a record of {len(value or b'')} bytes for {self._topic} fits in no batch")
        self._batch._relative_offset = number + 1  # noqa: SLF001

    def _begin(self) -> None:
        self._batch = self._producer.create_batch()
        self._append = self._batch._builder.append  # noqa: SLF001
        self._batches.append(self._batch)


class Outputs:
    """Records of one transaction. Order within a topic-partition is the order in which its lane got them."""

    def __init__(self, producer: aiokafka.AIOKafkaProducer) -> None:
        self._producer = producer
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._batches: dict[tuple[str, int], list[Any]] = {}

    def lane(self, topic: str, partition: int) -> Lane:
        """Where the records of a topic-partition go; whoever asks adds at least one."""
        lane = self._lanes.get((topic, partition))
        if lane is None:
            batches = self._batches[topic, partition] = []
            lane = self._lanes[topic, partition] = Lane(topic, self._producer, batches)
        return lane

    async def send_all(self) -> None:
        """Send every batch and wait for the broker's answer to each.

        Raises:
            KafkaError: a batch was refused; the transaction must be aborted.
        """
        sent: list[Any] = []
        try:
            for (topic, partition), batches in self._batches.items():
                for batch in batches:
                    batch.close()
                    sent.append(await self._producer.send_batch(batch, topic, partition=partition))
        except (KafkaError, IllegalOperation):
            # After a refusal the producer takes nothing more; why, only the batches that it had taken can tell.
            await asyncio.gather(*sent)
            raise
        await asyncio.gather(*sent)
