"""What consumers hand out is aiokafka's record but for its class."""

from __future__ import annotations

import dataclasses
import gc

from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.adapters.kafka import cluster
from settler_streams.adapters.kafka.fetched import FetchedRecord


def test_a_fetched_record_has_the_fields_of_aiokafkas() -> None:
    assert FetchedRecord.__struct_fields__ == tuple(field.name for field in dataclasses.fields(ConsumerRecord))


def test_consumers_of_a_process_that_knows_a_cluster_hand_it_out() -> None:
    assert cluster.Cluster, "imported: what installs it"
    batch = BatchBuilder(10_000, 0, is_transactional=False)
    batch.append(timestamp=5, key=b"k", value=None, headers=[("h", b"v")])
    records = MemoryRecords(bytes(batch._build()))
    (record,) = PartitionRecords(TopicPartition("t", 3), records, [], 0, None, None, True, READ_COMMITTED)
    assert record == FetchedRecord("t", 3, 0, 5, 0, b"k", None, None, 1, -1, (("h", b"v"),))
    assert not gc.is_tracked(record)
