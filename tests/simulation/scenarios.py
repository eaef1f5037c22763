"""What one does to a broker, and what is seen of it: the same steps through aiokafka or through the simulation.

Each scenario returns its observations in order. Errors are observed by what the step makes of them: fenced or not, and
their kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka.errors import IllegalOperation, KafkaError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from settler_streams.adapters.kafka.fencing import fenced

MESSAGE_BYTES_MAX = 4_000
"""Of the scenarios' topic."""
SETTLE_S_MAX = 60.0
"""Markers follow their commit within milliseconds; a transaction that times out is found within ten seconds."""
GROUP_OFFSET = 7

Scenario = Callable[["Bench"], Awaitable[list[Any]]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(play: Scenario) -> Scenario:
    """Register a scenario under its name."""
    SCENARIOS[play.__name__.replace("_", " ")] = play
    return play


class Bench:
    """One cluster, real or simulated, and a topic of two partitions in it that nobody else uses."""

    def __init__(self, cluster: Any, topic: str) -> None:
        self._cluster = cluster
        self._started: list[Any] = []
        self.topic = topic
        self.tps = [TopicPartition(topic, 0), TopicPartition(topic, 1)]

    async def producer(self, name: str, timeout_ms: int = 20_000) -> Any:
        """A started producer; one of the same name fences the former."""
        identity = f"{self.topic}-{name}"
        producer = self._cluster.producer(
            client_id=identity, transactional_id=identity, transaction_timeout_ms=timeout_ms, acks="all", linger_ms=0
        )
        await producer.start()
        self._started.append(producer)
        return producer

    async def send(self, producer: Any, partition: int, *values: bytes) -> asyncio.Future[Any]:
        """Hand records over as one batch."""
        batch = producer.create_batch()
        for value in values:
            assert batch.append(timestamp=None, key=b"k", value=value, headers=[]) is not None
        batch.close()
        sent: asyncio.Future[Any] = await producer.send_batch(batch, self.topic, partition=partition)
        return sent

    async def sent(self, producer: Any, partition: int, *values: bytes) -> None:
        """Send, and wait for the answer."""
        await (await self.send(producer, partition, *values))

    async def add_offsets(self, producer: Any) -> None:
        """Commit an offset within the transaction."""
        await producer.send_offsets_to_transaction({self.tps[0]: OffsetAndMetadata(GROUP_OFFSET, "")}, self.topic)

    async def seen(self, isolation: str = "read_committed") -> list[Any]:
        """Ends, records (partition, offset, value) and the position after them."""
        consumer = self._consumer(isolation)
        await consumer.start()
        try:
            consumer.assign(self.tps)
            ends = await consumer.end_offsets(self.tps)
            found: list[Any] = []
            for tp in self.tps:
                consumer.seek(tp, 0)
            async with asyncio.timeout(SETTLE_S_MAX):
                while any([await consumer.position(tp) < ends[tp] for tp in self.tps]):
                    for records in (await consumer.getmany(timeout_ms=50)).values():
                        found += [(record.partition, record.offset, record.value) for record in records]
            return [[ends[tp] for tp in self.tps], sorted(found), [await consumer.position(tp) for tp in self.tps]]
        finally:
            await consumer.stop()

    async def group_offset(self) -> int | None:
        """The group's committed offset."""
        consumer = self._consumer("read_committed")
        await consumer.start()
        try:
            offset: int | None = await consumer.committed(self.tps[0])
            return offset
        finally:
            await consumer.stop()

    async def settled(self, *, with_offset: bool = False) -> None:
        """Ask again and again until no transaction is open or being completed; each answer takes its time."""
        async with asyncio.timeout(SETTLE_S_MAX):
            while (await self._ends("read_committed")) != (await self._ends("read_uncommitted")):
                pass
            while with_offset and await self.group_offset() is None:
                pass

    async def _ends(self, isolation: str) -> Any:
        consumer = self._consumer(isolation)
        await consumer.start()
        try:
            consumer.assign(self.tps)
            return await consumer.end_offsets(self.tps)
        finally:
            await consumer.stop()

    def _consumer(self, isolation: str) -> Any:
        return self._cluster.consumer(
            group_id=self.topic, isolation_level=isolation, enable_auto_commit=False, auto_offset_reset="none"
        )

    async def close(self) -> None:
        """Stop every producer."""
        for producer in self._started:
            await producer.stop()


async def outcome(work: Awaitable[Any]) -> str:
    """How a call ends: well, fenced, or by another error's name."""
    try:
        await work
    except (KafkaError, IllegalOperation) as error:
        return "fenced" if fenced(error) else type(error).__name__
    except AssertionError:
        return "refused by the client"
    return "well"


@scenario
async def a_committed_transaction_is_seen_whole_and_only_then(bench: Bench) -> list[Any]:
    producer = await bench.producer("one")
    await producer.begin_transaction()
    await bench.sent(producer, 0, b"1", b"2")
    await bench.sent(producer, 1, b"3")
    await bench.add_offsets(producer)
    before = [await bench.seen(), await bench.seen("read_uncommitted"), await bench.group_offset()]
    await producer.commit_transaction()
    await bench.settled(with_offset=True)
    return [*before, await bench.seen(), await bench.seen("read_uncommitted"), await bench.group_offset()]


@scenario
async def an_aborted_transaction_leaves_offsets_and_nothing_else(bench: Bench) -> list[Any]:
    producer = await bench.producer("one")
    await producer.begin_transaction()
    await bench.sent(producer, 0, b"1", b"2")
    await bench.add_offsets(producer)
    await producer.abort_transaction()
    await bench.settled()
    await producer.begin_transaction()
    await bench.sent(producer, 0, b"3")
    await producer.commit_transaction()
    await bench.settled()
    return [await bench.seen(), await bench.seen("read_uncommitted"), await bench.group_offset()]


@scenario
async def a_former_owner_is_fenced_at_its_next_send(bench: Bench) -> list[Any]:
    former = await bench.producer("owner")
    await former.begin_transaction()
    await bench.sent(former, 0, b"never")
    owner = await bench.producer("owner")
    settled = await bench.seen()
    sent = await outcome(bench.sent(former, 0, b"neither"))
    ended = await outcome(former.commit_transaction())
    await owner.begin_transaction()
    await bench.sent(owner, 0, b"mine")
    await owner.commit_transaction()
    await bench.settled()
    return [settled, sent, ended, await bench.seen(), await bench.seen("read_uncommitted")]


@scenario
async def a_former_owner_is_fenced_at_a_partition_that_is_new_to_it(bench: Bench) -> list[Any]:
    former = await bench.producer("owner")
    await former.begin_transaction()
    await bench.sent(former, 0, b"never")
    await bench.producer("owner")
    sent = await outcome(bench.sent(former, 1, b"neither"))
    again = await outcome(bench.sent(former, 0, b"nor this"))
    return [sent, again, await outcome(former.abort_transaction()), await bench.seen()]


@scenario
async def a_former_owner_is_fenced_at_its_offsets(bench: Bench) -> list[Any]:
    former = await bench.producer("owner")
    await former.begin_transaction()
    await bench.sent(former, 0, b"never")
    await bench.producer("owner")
    return [await outcome(bench.add_offsets(former)), await bench.seen(), await bench.group_offset()]


@scenario
async def a_former_owner_is_fenced_at_its_commit(bench: Bench) -> list[Any]:
    former = await bench.producer("owner")
    await former.begin_transaction()
    await bench.sent(former, 0, b"never")
    await bench.add_offsets(former)
    await bench.producer("owner")
    return [await outcome(former.commit_transaction()), await bench.seen(), await bench.group_offset()]


@scenario
async def a_commit_does_not_mind_a_produce_that_has_failed(bench: Bench) -> list[Any]:
    producer = await bench.producer("one")
    await producer.begin_transaction()
    large = await outcome(bench.sent(producer, 0, b"x" * 2 * MESSAGE_BYTES_MAX))
    await bench.sent(producer, 1, b"small")
    await bench.add_offsets(producer)
    ended = await outcome(producer.commit_transaction())
    await bench.settled(with_offset=True)
    return [large, ended, await bench.seen(), await bench.group_offset()]


@scenario
async def an_open_transaction_hides_what_others_have_committed_behind_it(bench: Bench) -> list[Any]:
    slow, quick = await bench.producer("slow"), await bench.producer("quick")
    await slow.begin_transaction()
    await bench.sent(slow, 0, b"slow")
    await quick.begin_transaction()
    await bench.sent(quick, 0, b"quick")
    await bench.sent(quick, 1, b"quick")
    await quick.commit_transaction()
    hidden = (await bench.seen())[0][0]
    await slow.abort_transaction()
    await bench.settled()
    return [hidden, await bench.seen()]


@scenario
async def a_transaction_that_takes_too_long_is_aborted_and_its_owner_fenced(bench: Bench) -> list[Any]:
    producer = await bench.producer("one", timeout_ms=1_000)
    await producer.begin_transaction()
    await bench.sent(producer, 0, b"never")
    await bench.settled()
    return [await bench.seen(), await outcome(producer.commit_transaction())]


@scenario
async def what_a_producer_refuses_by_itself(bench: Bench) -> list[Any]:
    producer = await bench.producer("one")
    observed = [await outcome(bench.send(producer, 0, b"1")), await outcome(producer.commit_transaction())]
    await producer.begin_transaction()
    observed.append(await outcome(producer.begin_transaction()))
    observed.append(await outcome(producer.commit_transaction()))
    await producer.begin_transaction()
    observed.append(await outcome(producer.abort_transaction()))
    return [*observed, await bench.seen()]
