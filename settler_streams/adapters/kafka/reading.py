"""Reading a partition up to an end that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import aiokafka
from aiokafka.structs import TopicPartition

POLL_MS = 500


async def advance(
    consumer: aiokafka.AIOKafkaConsumer, tp: TopicPartition, position: int
) -> tuple[Sequence[aiokafka.ConsumerRecord[Any, Any]], int]:
    """What comes at ``position``, and the position behind it; no records where there were only transactions' markers.

    Waits for as long as the position stands still, so whoever calls it sets the deadline. The client keeps none: its
    poll returns without records whatever the broker does, and it waits without end for a position that it does not get.

    Raises:
        KafkaError: the broker refuses this reader.
    """
    while True:
        fetched = await consumer.getmany(tp, timeout_ms=POLL_MS)
        reached: int = await consumer.position(tp)
        if fetched or reached != position:
            return fetched.get(tp, ()), reached
