"""The committed log of one world, read once: what a judge may look at."""

from __future__ import annotations

from typing import Any

from aiokafka.structs import ConsumerRecord, TopicPartition

from settler_streams.events import Envelope, Part, decode
from tests.simulation.broker import Broker

Raw = ConsumerRecord[Any, Any]


class CommittedLog:
    """Every record that was ever committed, whatever compaction and retention have taken since."""

    def __init__(self, broker: Broker, deployment: str) -> None:
        self.offsets = broker.offsets
        self._deployment = deployment
        self._records: dict[TopicPartition, list[Raw]] = {}
        self._written: dict[str, dict[TopicPartition, list[Raw]]] = {}
        for topic in broker.topics.values():
            for partition in topic.partitions:
                records = self._records[partition.tp] = []
                for entry in partition.committed_entries():
                    assert entry.record is not None
                    records.append(entry.record)
                    if entry.transaction is not None:
                        written = self._written.setdefault(entry.transaction.transactional_id, {})
                        written.setdefault(partition.tp, []).append(entry.record)

    def records(self, topic: str, partition: int) -> list[Raw]:
        """The records of one partition, by the declared name of its topic."""
        return self._records[TopicPartition(f"{self._deployment}.{topic}", partition)]

    def topic(self, topic: str) -> list[Raw]:
        """All records of a topic, partition by partition."""
        name = f"{self._deployment}.{topic}"
        return [record for tp, records in self._records.items() if tp.topic == name for record in records]

    def written_by(self, transactional_id: str) -> dict[TopicPartition, list[Raw]]:
        """What one fold has written, by partition."""
        return self._written.get(transactional_id, {})

    def events(self, topic: str, kind: type[Part]) -> list[Envelope[Part]]:
        """The events of one type in a topic; whatever else lies there is passed over."""
        marker = f'"type":"{kind.event_type}"'.encode()
        return [decode(raw.value) for raw in self.topic(topic) if (raw.value or b"").startswith(b"{" + marker)]
