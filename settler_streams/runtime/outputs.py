"""What a step sends: records collected per topic and partition, sent as whole batches, every one of them awaited."""

from __future__ import annotations

import asyncio
from typing import Any

import aiokafka
from aiokafka.errors import IllegalOperation, KafkaError


class Outputs:
    """Records of one transaction. Order within a topic-partition is the order of :meth:`add`."""

    def __init__(self, producer: aiokafka.AIOKafkaProducer) -> None:
        self._producer = producer
        self._batches: dict[tuple[str, int], list[Any]] = {}

    def add(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes]],
    ) -> None:
        """Collect one record. ``value`` ``None`` is a tombstone."""
        batches = self._batches.get((topic, partition))
        if batches is None:
            batches = self._batches[topic, partition] = []
        if not batches or batches[-1].append(timestamp=None, key=key, value=value, headers=headers) is None:
            batch = self._producer.create_batch()
            batches.append(batch)
            if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:
                raise ValueError(f"a record of {len(value or b'')} bytes for {topic} fits in no batch")

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
