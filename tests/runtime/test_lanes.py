"""A lane's batches hold what aiokafka's own batches would, though they are filled past their ``append``."""

from __future__ import annotations

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from settler_streams.runtime.outputs import Outputs

BATCH_BYTES = 2_000
RECORDS = [
    (b"key-%d" % number, None if number % 5 == 0 else b"value" * number, [("name", b"%d" % number)] * (number % 3))
    for number in range(60)
]


class Producer:
    """Makes batches as the real one does, and keeps what is sent."""

    def __init__(self):
        self.sent = []

    def create_batch(self):
        return BatchBuilder(BATCH_BYTES, 0, is_transactional=True)

    async def send_batch(self, batch, topic, *, partition):
        self.sent.append((topic, partition, batch))
        return _done()


async def _done():
    return None


def _records(batch):
    records = MemoryRecords(bytes(batch._build()))
    found = [(record.offset, record.key, record.value, record.headers) for record in records.next_batch()]
    assert not records.has_next()
    return found


def _filled_by_append(records):
    batches = [Producer().create_batch()]
    for key, value, headers in records:
        if batches[-1].append(timestamp=None, key=key, value=value, headers=headers) is None:
            batches.append(Producer().create_batch())
            batches[-1].append(timestamp=None, key=key, value=value, headers=headers)
    return batches


async def test_a_lane_fills_batches_as_their_own_append_does():
    producer = Producer()
    outputs = Outputs(producer)
    lane = outputs.lane("a", 1)
    for record in RECORDS:
        lane.add(*record)
    assert outputs.lane("a", 1) is lane
    await outputs.send_all()
    assert {place[:2] for place in producer.sent} == {("a", 1)}
    got, wanted = [batch for *_, batch in producer.sent], _filled_by_append(RECORDS)
    assert len(got) > 3
    assert [batch.record_count() for batch in got] == [batch.record_count() for batch in wanted]
    assert all(batch.closed() for batch in got)
    assert [_records(batch) for batch in got] == [_records(batch) for batch in wanted]


class Full:
    """A batch into which nothing fits."""

    _relative_offset = 0

    class _builder:  # noqa: N801 - aiokafka's name
        append = staticmethod(lambda *_: None)


def test_a_record_that_fits_no_batch_is_an_error():
    producer = Producer()
    producer.create_batch = Full
    with pytest.raises(ValueError, match="a record of 5 bytes for a fits in no batch"):
        Outputs(producer).lane("a", 0).add(b"key", b"value", [])
