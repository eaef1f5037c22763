"""The dead letters of one tenant, taken out of their topic before their time."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import letters_in, reader, translated
from settler_streams.adapters.kafka.tenant_records import DEAD_LETTERS
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name

UNANSWERED_MAX = 500
"""Tombstones on their way at a time."""


async def take_out(settings: Settings, topology: Topology, tenant: TenantId) -> int:
    """Put a tombstone over every dead letter that is of the tenant, as :meth:`DeadLetter.is_of` says; returns how many.

    No reader of ours shows them from then on, and the next compaction removes their bytes, a day later at most. May be
    repeated, also by several at a time.

    Raises:
        UnavailableError: Kafka did not answer; run it again.
    """
    done = 0
    consumer, producer = reader(settings), Cluster.of(settings).producer(acks="all")
    async with translated("taking out dead letters"), contextlib.AsyncExitStack() as stack:
        for client in (consumer, producer):
            await client.start()
            stack.push_async_callback(client.stop)
        for number in range(topology.partitions(DEAD_LETTERS)):
            tp = TopicPartition(full_name(settings.deployment, DEAD_LETTERS), number)
            sent: list[asyncio.Future[Any]] = []
            async with contextlib.aclosing(letters_in(consumer, tp)) as letters:
                async for letter in letters:
                    if letter.is_of({tenant}):
                        sent.append(await producer.send(tp.topic, None, key=letter.place, partition=number))
                        if len(sent) == UNANSWERED_MAX:
                            await asyncio.gather(*sent)
                            sent.clear()
                        done += 1
            await asyncio.gather(*sent)
    return done


async def left_of(settings: Settings, topology: Topology, tenant: TenantId) -> int:
    """How many dead letters of the tenant no tombstone has taken out.

    Raises:
        UnavailableError: Kafka did not answer.
    """
    found = 0
    consumer = reader(settings)
    async with translated("looking for dead letters"):
        await consumer.start()
        try:
            for number in range(topology.partitions(DEAD_LETTERS)):
                tp = TopicPartition(full_name(settings.deployment, DEAD_LETTERS), number)
                async with contextlib.aclosing(letters_in(consumer, tp)) as letters:
                    found += sum([letter.is_of({tenant}) async for letter in letters])
        finally:
            await consumer.stop()
    return found
