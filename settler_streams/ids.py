"""Identifiers: who a tenant is, how ids are made, and which partition a key lives in."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from typing import NewType

TenantId = NewType("TenantId", str)
"""A tenant's UUID in canonical lower-case form; the first argument wherever a tenant matters."""

JobId = NewType("JobId", str)
"""A job's UUID: the id of the ``job.requested`` event that asked for it."""

PLATFORM = TenantId("00000000-0000-0000-0000-000000000000")
"""The nil UUID stands for the platform itself (global flags, unattributable dead letters); never NULL."""

_OUTPUTS = uuid.UUID("7c9a3f0e-5d0b-5f57-9d3f-0d6a2d1c4e11").bytes
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}
_MURMUR2_SEED = 0x9747B28C
_MURMUR2_M = 0x5BD1E995
_U32 = 0xFFFFFFFF


class _Uuid7:
    """The last id made in this process, without version and variant: 48 bits of time, then 74."""

    last = 0


def uuid7(now_ms: int) -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits.

    What one thread makes in a row for one millisecond ascends (section 6.2, method 2: each is a random step of up to 56
    bits above the last), so that rows sorted by their ids are in the order in which they were made.
    """
    if _Uuid7.last >> 74 == now_ms:
        made = _Uuid7.last + 1 + secrets.randbits(56)
    else:
        made = (now_ms & ((1 << 48) - 1)) << 74 | secrets.randbits(73)  # the highest bit is room for the steps
    _Uuid7.last = made
    value = made >> 74 << 80 | 0x7 << 76 | (made >> 62 & 0xFFF) << 64 | 0b10 << 62 | made & ((1 << 62) - 1)
    return str(uuid.UUID(int=value))


def is_uuid7(text: str) -> bool:
    """Whether ``text`` is a UUID of version 7 in canonical form (36 lower-case characters)."""
    try:
        given = uuid.UUID(text)
    except ValueError:
        return False
    return given.version == 7 and str(given) == text


def derived_id(source_id: str, suffix: str) -> str:
    """The id of an output: a function of its input's id and a fixed suffix, so that a replay repeats it bit for bit.

    It is the UUIDv5 (RFC 9562, section 5.5) of ``source_id/suffix``, at a third of what the standard library takes.
    """
    name = _OUTPUTS + f"{source_id}/{suffix}".encode()
    digits = hashlib.sha1(name, usedforsecurity=False).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:32]}"


def canonical_tenant(text: str) -> TenantId:
    """Parse a tenant id.

    Raises:
        ValueError: ``text`` is not a UUID in canonical form (36 lower-case characters).
    """
    if len(text) != 36 or str(uuid.UUID(text)) != text:
        raise ValueError(f"not a tenant id in canonical form: {text!r}")
    return TenantId(text)


def murmur2(key: bytes) -> int:
    """Kafka's 32-bit murmur2, as its default partitioner uses it (the sign bit is not yet masked)."""
    length = len(key)
    h = _MURMUR2_SEED ^ length
    whole = length - length % 4
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little")
        k = k * _MURMUR2_M & _U32
        k ^= k >> 24
        k = k * _MURMUR2_M & _U32
        h = (h * _MURMUR2_M & _U32) ^ k
    if tail := key[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * _MURMUR2_M & _U32
    h ^= h >> 13
    h = h * _MURMUR2_M & _U32
    return h ^ h >> 15


def partition_of(key: str, partitions: int) -> int:
    """The partition that Kafka's own default partitioner gives to ``key``."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions
