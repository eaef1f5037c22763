"""Which partition a key belongs to, remembered for the tenants at hand."""

from __future__ import annotations

from functools import lru_cache

from settler_streams.errors import RecordError
from settler_streams.ids import partition_of
from settler_streams.topology import Topology

KEYS_REMEMBERED = 65_536
"""Hashing a key costs microseconds in Python; this many tenants' answers are kept (about 10 MiB)."""


class Router:
    """Partition numbers for the keys of one deployment's topics."""

    def __init__(self, topology: Topology) -> None:
        self._partitions = {topic.name: topology.partitions(topic.name) for topic in topology.topics}
        self._keyed = frozenset(topic.name for topic in topology.topics if topic.key == "root-tenant")
        self._hash = lru_cache(maxsize=KEYS_REMEMBERED)(partition_of)

    def partition_for(self, topic: str, key: str) -> int:
        """Where a record of ``topic`` with ``key`` belongs, by Kafka's default partitioner."""
        return self._hash(key, self._partitions[topic])

    def home_of(self, topic: str, key: str, arrived_in: int) -> int:
        """The partition in which an arrived record should be: another one if its producer used another partitioner.

        Raises:
            RecordError: ``key``; the topic is keyed by root tenant and the record has no key.
        """
        if topic not in self._keyed:
            return arrived_in
        if not key:
            raise RecordError("key", f"records of {topic} are keyed by their root tenant; this one has no key")
        return self.partition_for(topic, key)
