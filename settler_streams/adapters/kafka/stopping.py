"""How a producer ends: with what it accepted delivered, or, when Kafka does not acknowledge it, without.

aiokafka's own stop waits for every acknowledgement, and an idempotent producer never gives a batch up: while the leader
of one partition hangs, it never returns. Cut short, it leaves its tasks and its connections behind.
"""

from __future__ import annotations

import asyncio
import inspect
from types import CoroutineType

import aiokafka
import structlog
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

log = structlog.get_logger(__name__)

DELIVERY_DEADLINE_S = 5.0
"""Longest wait for what is still unacknowledged. Who sends something waits for it himself, and longer: what is left at
the end has been given up by then, or was sent a moment ago, which takes milliseconds."""
CLOSE_DEADLINE_S = 1.0
"""Longest wait for cancelled tasks and for connections that were cut, which need a turn of the loop or two."""


async def stop_producer(producer: aiokafka.AIOKafkaProducer) -> None:
    """Deliver what was accepted, then disconnect; after :data:`DELIVERY_DEADLINE_S` disconnect without.

    Bounded, and raises nothing of Kafka's: it is called where an error may be on its way already, which says more. When
    it returns, or is cancelled, the producer has neither tasks nor connections. Whether what it has not delivered was
    stored is unknown, and whoever waits for the acknowledgement waits for his own deadline.
    """
    try:
        async with asyncio.timeout(DELIVERY_DEADLINE_S):
            await producer.stop()
    except (KafkaError, TimeoutError) as error:
        log.warning("producer ended without Kafka's acknowledgement of all that it had sent", error=repr(error))
    finally:
        await _disconnect(producer)


async def _disconnect(producer: aiokafka.AIOKafkaProducer) -> None:
    """End whatever of ``producer`` is left; nothing, after a stop in order."""
    owners = (producer._sender, producer._message_accumulator, producer.client)  # noqa: SLF001 - it keeps no list
    tasks = [task for task in asyncio.all_tasks() if any(_self_of(task) is owner for owner in owners)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=CLOSE_DEADLINE_S)
    try:
        async with asyncio.timeout(CLOSE_DEADLINE_S):
            await _cut(producer.client)
    except TimeoutError:
        log.warning("connections of a producer did not close")


def _self_of(task: asyncio.Task[object]) -> object:
    """The object whose method the task runs; None for another function's."""
    coroutine = task.get_coro()
    return inspect.getcoroutinelocals(coroutine).get("self") if isinstance(coroutine, CoroutineType) else None


async def _cut(client: AIOKafkaClient) -> None:
    """Close the connections without what they have not sent yet: a frozen peer takes no more of it."""
    for connection in client._conns.values():  # noqa: SLF001 - its close waits until the peer has taken everything
        if connection._writer is not None:  # noqa: SLF001
            connection._writer.transport.abort()  # noqa: SLF001
    await client.close()
