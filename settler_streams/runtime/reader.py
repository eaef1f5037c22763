"""Reads one fold's inputs: a consumer of the fold's own, whose position nobody else moves.

The group's consumer, which all folds of a worker share, could not do this as well. It asks a broker for all partitions
at a time, and while records of one fold wait for its step to end, it asks for none: a busy fold would hold up the idle
ones. And each rebalance would take its positions away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aiokafka.errors import KafkaError, OffsetOutOfRangeError, UnknownTopicOrPartitionError

from settler_streams.adapters.telemetry.metrics import METRICS
from settler_streams.errors import StateError, UnavailableError

if TYPE_CHECKING:
    import aiokafka
    from aiokafka.structs import ConsumerRecord, TopicPartition

    from settler_streams.adapters.kafka.cluster import Cluster

FETCH_MAX_WAIT_MS = 500
"""How long the broker keeps a request for records that are not there yet. The request is always under way, so what
arrives is answered at once; this is only how often an idle fold asks again."""
BATCH_RECORDS_MAX = 16_000
"""Records in one step at most: bounds the time of its transaction whatever the lag."""
PARTITION_BYTES_MAX = 4 * 1024 * 1024
"""Of one partition in one step, as stored; a single larger batch is still handed over, or the fold would stop there."""
RESPONSE_BYTES_MAX = 16 * 1024 * 1024
"""Of all inputs together. A fold holds the step's records and one response that was fetched meanwhile, never more:
nothing is asked for while records wait."""


class InputReader:
    """Committed records of the inputs, each once, in order.

    It is made at rest. A broker answers the requests of a connection one after another, and keeps one for records that
    are not there yet for half a second: whoever asks for offsets meanwhile waits as long, several times per takeover.
    """

    def __init__(self, role: str, consumer: aiokafka.AIOKafkaConsumer, inputs: Sequence[TopicPartition]) -> None:
        self._role = role
        self._consumer = consumer
        self._inputs = list(inputs)
        # Assigned at once, the topics become known to the client together; asked for one by one, each takes a tenth of
        # a second. Without any position the client would look for one.
        consumer.assign(self._inputs)
        for tp in self._inputs:
            consumer.seek(tp, 0)
        consumer.pause(*self._inputs)

    async def bounds(self) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        """Where the inputs begin, and up to where they are committed.

        Raises:
            KafkaError: the broker did not answer.
        """
        return await self._consumer.beginning_offsets(self._inputs), await self._consumer.end_offsets(self._inputs)

    def begin(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read from these positions on."""
        for tp in self._inputs:
            self._consumer.seek(tp, positions[tp])
        self._consumer.resume(*self._inputs)

    async def fetch(self, wait_s: float) -> Mapping[TopicPartition, Sequence[ConsumerRecord[bytes, bytes]]]:
        """What has arrived, bounded in records and bytes, by input in declared order; empty after ``wait_s`` seconds.

        Raises:
            KafkaError: the log no longer holds the position, an input is gone, or the broker refuses this reader.
        """
        records: Mapping[TopicPartition, Sequence[ConsumerRecord[bytes, bytes]]] = await self._consumer.getmany(
            timeout_ms=int(wait_s * 1000), max_records=BATCH_RECORDS_MAX
        )
        self._check_inputs()
        self._observe_lag(records)
        return {tp: records[tp] for tp in self._inputs if tp in records}

    def _check_inputs(self) -> None:
        """A fetch of a topic that is gone is asked again and again, without an error, and reads on in its namesake.

        The client's metadata, which it renews at each such refusal, knows; the next opening finds out what is meant.
        """
        for tp in self._inputs:
            if self._consumer.partitions_for_topic(tp.topic) is None:
                raise UnknownTopicOrPartitionError(f"{tp.topic} is gone")

    async def backlog(self) -> tuple[list[int], bool]:
        """The offsets that are read next, and whether the broker, asked now, holds records there.

        Raises:
            KafkaError: the broker did not answer.
        """
        ends = await self._consumer.end_offsets(self._inputs)
        at = [await self._consumer.position(tp) for tp in self._inputs]
        return at, any(ends[tp] > position for tp, position in zip(self._inputs, at, strict=True))

    async def close(self) -> None:
        """Stop reading."""
        await self._consumer.stop()

    def _observe_lag(self, records: Mapping[TopicPartition, Sequence[ConsumerRecord[bytes, bytes]]]) -> None:
        """Committed records from the batch in hand on: what is not yet consumed."""
        for tp in self._inputs:
            end = self._consumer.last_stable_offset(tp)
            if end is not None:
                lag = end - records[tp][0].offset if tp in records else 0
                METRICS.consumer_lag.labels(self._role, tp.topic, str(tp.partition)).set(max(0, lag))


@contextmanager
def kafka_errors(reader: object) -> Iterator[None]:
    """What Kafka refuses a reader of, as this system says it.

    Raises:
        StateError: the log does not hold the position any more.
        UnavailableError: anything else.
    """
    try:
        yield
    except OffsetOutOfRangeError as error:
        raise StateError(f"{reader}: the log does not hold the next position any more: {error!r}") from error
    except KafkaError as error:
        raise UnavailableError(f"{reader}: {error!r}") from error


def new_consumer(cluster: Cluster, name: str) -> aiokafka.AIOKafkaConsumer:
    """A consumer as a session wants it, not started: committed records only, no offset is ever reset, no group.

    One with a group's name must not be assigned anew: aiokafka's coordinator then fails an assertion now and then.
    ``name`` is shown in the broker's logs.
    """
    return cluster.consumer(
        client_id=name,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        fetch_max_wait_ms=FETCH_MAX_WAIT_MS,
        fetch_max_bytes=RESPONSE_BYTES_MAX,
        max_partition_fetch_bytes=PARTITION_BYTES_MAX,
    )
