"""Kafka's default partitioner, written down once more so that the checker does not trust the one it checks."""

from __future__ import annotations

from functools import lru_cache

_MASK = 0xFFFFFFFF


def murmur2(key: bytes) -> int:
    """The 32-bit hash of ``org.apache.kafka.common.utils.Utils.murmur2``."""
    m, h = 0x5BD1E995, 0x9747B28C ^ len(key)
    blocks = len(key) // 4
    for number in range(blocks):
        k = int.from_bytes(key[4 * number : 4 * number + 4], "little") * m & _MASK
        k = (k ^ (k >> 24)) * m & _MASK
        h = (h * m & _MASK) ^ k
    rest = key[4 * blocks :]
    for place in reversed(range(len(rest))):
        h ^= rest[place] << (8 * place)
    if rest:
        h = h * m & _MASK
    h = (h ^ (h >> 13)) * m & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=65_536)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of ``key``."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
