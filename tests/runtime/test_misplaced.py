"""What lies in a wrong partition is forwarded once, however many folds read its topic."""

from __future__ import annotations

import time

import aiokafka
import pytest
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.ids import partition_of
from settler_streams.runtime.routing import KEY_BYTES_REMEMBERED_MAX, Router
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.step import Step
from settler_streams.topology import load_topology
from settler_streams.workers.folds import FOLDS
from tests.runtime.counter import tenant_in

TOPOLOGY = load_topology()
SHARED = [
    topic.name
    for topic in TOPOLOGY.topics
    if topic.key == "root-tenant" and any(topic.name in fold.inputs for fold in TOPOLOGY.folds)
]


@pytest.mark.parametrize("topic", SHARED)
async def test_one_of_the_folds_that_read_a_topic_forwards(topic: str) -> None:
    """Otherwise the right partition would meet as many copies; not every fold remembers ids."""
    readers = [fold.role for fold in TOPOLOGY.folds if topic in fold.inputs]
    forwarding = [role for role in readers if forwards(role, topic)]
    assert len(forwarding) == 1


def forwards(role: str, topic: str) -> bool:
    """Whether the fold of partition 0 sends on a record that belongs into partition 1."""
    declared = TOPOLOGY.fold(role)
    spec = FoldSpec(
        declared, TOPOLOGY, "localhost:1", "test", FOLDS[role].kinds, lambda *_: pytest.fail("unused"), Router(TOPOLOGY)
    )
    session = Session(spec, 0)
    session.producer = aiokafka.AIOKafkaProducer(bootstrap_servers="localhost:1")
    tp = TopicPartition(f"test.{topic}", 0)
    session.positions = {tp: 0}
    key = tenant_in(1).encode()
    raw = ConsumerRecord(tp.topic, 0, 0, time.time_ns() // 10**6, 1, key, b"any", None, len(key), 3, ())
    step = Step(session, {tp: [raw]})
    assert list(step.decode()) == []
    assert not step._outputs._batches.keys() - {(tp.topic, 1)}
    return bool(step._outputs._batches)


def test_keys_of_any_length_are_placed_alike_and_only_short_ones_are_kept() -> None:
    router = Router(load_topology())
    for length in (36, KEY_BYTES_REMEMBERED_MAX, KEY_BYTES_REMEMBERED_MAX + 1, 2**20):
        key = "k" * length
        home = partition_of(key, load_topology().partitions("job-requests"))
        for _ in range(2):
            assert router.place_of("job-requests", key.encode(), 0) == (key, home)
            assert router.partition_for("job-requests", key) == home
    assert {len(key) for _, key in router._places if key is not None} == {36, KEY_BYTES_REMEMBERED_MAX}
