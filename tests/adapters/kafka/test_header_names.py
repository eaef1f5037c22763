"""Header names that are no UTF-8: the record is read, and so is all that lies behind it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record import memory_records
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.adapters.kafka import header_names
from settler_streams.adapters.kafka.header_names import ForgivingRecords
from tests.adapters.kafka.spoilt_headers import PLACEHOLDER, spoilt

TP = TopicPartition("t", 0)
CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
SHOWN = "\\xff\\xfe"


def batch(first: int, names: Sequence[str], codec: int = 0) -> bytes:
    """A record for each name of a header, from an offset on; as a broker stores it."""
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 20)
    for at, name in enumerate(names):
        builder.append(at, 1, b"k", f"v{first + at}".encode(), [(name, b"1"), ("next", None)])
    return first.to_bytes(8, "big") + bytes(builder.build())[8:]


def read(fetched: bytes, position: int = 0) -> list[ConsumerRecord[bytes, bytes]]:
    records = ForgivingRecords(fetched)
    return list(PartitionRecords(TP, records, [], position, None, None, True, READ_COMMITTED))


@pytest.fixture(params=["compiled", "python"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where aiokafka's extensions cannot be loaded, it takes its decoders that are written in Python."""
    if request.param == "python":
        monkeypatch.setattr(header_names, "MemoryRecords", header_names._MemoryRecordsPy)
        monkeypatch.setattr(memory_records, "DefaultRecordBatch", header_names._DefaultRecordBatchPy)
        monkeypatch.setattr(header_names, "DefaultRecordBatch", header_names._DefaultRecordBatchPy)


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("codec", CODECS)
def test_what_lies_around_a_name_that_is_no_utf8_is_read_once_and_in_order(codec: str) -> None:
    fetched = (
        batch(0, ["a", "é"], CODECS[codec])
        + spoilt(batch(2, ["b", PLACEHOLDER, "c"], CODECS[codec]))
        + batch(5, ["d"], CODECS[codec])
        + spoilt(batch(6, [PLACEHOLDER, PLACEHOLDER], CODECS[codec]))
    )
    found = read(fetched)
    assert [record.offset for record in found] == list(range(8))
    assert [record.value for record in found] == [f"v{n}".encode() for n in range(8)]
    names = ["a", "é", "b", SHOWN, "c", "d", SHOWN, SHOWN]
    assert [record.headers for record in found] == [((name, b"1"), ("next", None)) for name in names]


def test_a_batch_that_is_spoilt_otherwise_is_refused_as_before() -> None:
    fetched = bytearray(batch(0, ["a", "b"]))
    fetched[-1] ^= 1
    with pytest.raises(CorruptRecordException):
        read(bytes(fetched))


def test_reading_may_begin_at_or_behind_such_a_record() -> None:
    fetched = spoilt(batch(4, ["a", PLACEHOLDER, "b"]))
    assert [record.offset for record in read(fetched, 5)] == [5, 6]
    assert [record.offset for record in read(fetched, 6)] == [6]
