"""Record batches as no client of aiokafka's can make them: with names of headers that are no UTF-8."""

from __future__ import annotations

from aiokafka import codec
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.util import calc_crc32c

PLACEHOLDER, NO_UTF8 = "XY", b"\xff\xfe"
COMPRESSED_BY = {
    0: bytes, 1: codec.gzip_encode, 2: codec.snappy_encode, 3: codec.lz4_encode, 4: codec.zstd_encode,
}  # fmt: skip
_LENGTH, _CHECKSUM, _CHECKED, _RECORDS = slice(8, 12), slice(17, 21), slice(21, None), slice(61, None)
"""Where a record batch has them; its length counts from behind itself."""


def spoilt(batch: bytes) -> bytes:
    """The batch with :data:`NO_UTF8` for each placeholder, and a length and a checksum that fit."""
    read = _DefaultRecordBatchPy(batch)
    read._maybe_uncompress()
    records = bytes(read._buffer)[read._pos :]
    assert PLACEHOLDER.encode() in records
    whole = bytearray(batch)
    whole[_RECORDS] = COMPRESSED_BY[read.compression_type](records.replace(PLACEHOLDER.encode(), NO_UTF8))
    whole[_LENGTH] = (len(whole) - _LENGTH.stop).to_bytes(4, "big")
    whole[_CHECKSUM] = calc_crc32c(bytes(whole[_CHECKED])).to_bytes(4, "big")
    return bytes(whole)
