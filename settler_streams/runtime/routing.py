"""Which partition a key belongs to, remembered for the tenants at hand."""

from __future__ import annotations

from functools import lru_cache

from settler_streams.errors import ConfigurationError, RecordError
from settler_streams.ids import partition_of
from settler_streams.topology import Topology

KEYS_REMEMBERED = 65_536
"""Hashing a key costs microseconds in Python; this many tenants' answers are kept (measured: 15 MiB)."""

KEY_BYTES_REMEMBERED_MAX = 256
"""A tenant's id has 36, a flag's key fewer than this; longer keys, which anyone could write, are not kept."""


class Router:
    """Partition numbers for the keys of one deployment's topics."""

    def __init__(self, topology: Topology) -> None:
        self._partitions = {topic.name: topology.partitions(topic.name) for topic in topology.topics}
        self._keyed = frozenset(topic.name for topic in topology.topics if topic.key == "root-tenant")
        self._edges = frozenset(
            (role, topic.name, event_type)
            for topic in topology.topics
            for role in topic.writers
            for event_type in topic.events
        )
        self.compacted = frozenset(topic.name for topic in topology.topics if topic.cleanup == "compact")
        """Topics in which a record without a value says that its key is gone."""
        self._writers = {topic.name: topic.writers for topic in topology.topics}
        self._places: dict[tuple[str, bytes | None], tuple[str, int]] = {}
        self._hash = lru_cache(maxsize=KEYS_REMEMBERED)(partition_of)

    def partition_for(self, topic: str, key: str) -> int:
        """Where a record of ``topic`` with ``key`` belongs, by Kafka's default partitioner."""
        partition_of_key = self._hash if len(key) <= KEY_BYTES_REMEMBERED_MAX else partition_of
        return partition_of_key(key, self._partitions[topic])

    def check_output(self, role: str, topic: str, event_type: str) -> None:
        """Hold what a role publishes against the declaration: its readers rely on who may write what.

        Raises:
            ConfigurationError: the topology does not declare it.
        """
        if (role, topic, event_type) not in self._edges:
            raise ConfigurationError(f"the topology does not let {role} write {event_type} to {topic}")

    def check_tombstone(self, role: str, topic: str) -> None:
        """As :meth:`check_output`, for a key that is deleted.

        Raises:
            ConfigurationError: the role does not write to the topic, or a tombstone means nothing there.
        """
        if topic not in self.compacted or role not in self._writers[topic]:
            raise ConfigurationError(f"the topology does not let {role} delete keys of {topic}")

    def place_of(self, topic: str, raw_key: bytes | None, arrived_in: int) -> tuple[str, int]:
        """The key of an arrived record as text, and its home (see :meth:`home_of`); remembered for the keys at hand.

        Raises:
            RecordError: ``key``; it is not UTF-8, or missing where it is needed.
        """
        known = self._places.get((topic, raw_key))
        if known is None:
            key = key_of(raw_key)
            known = key, self.home_of(topic, key, arrived_in)
            if raw_key is not None and topic in self._keyed and len(raw_key) <= KEY_BYTES_REMEMBERED_MAX:
                if len(self._places) >= KEYS_REMEMBERED:
                    self._places.clear()
                self._places[topic, raw_key] = known
        return known

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


def key_of(raw_key: bytes | None) -> str:
    """A record's key as text, empty when there is none.

    Raises:
        RecordError: ``key``; it is not UTF-8.
    """
    try:
        return raw_key.decode() if raw_key is not None else ""
    except UnicodeDecodeError as error:
        raise RecordError("key", f"the record's key is not UTF-8: {error.object[:100]!r}") from error
