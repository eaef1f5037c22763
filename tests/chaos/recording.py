"""A recording: the committed records of every topic, the tables and the positions, as a round has left them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import aiokafka
import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import TopicPartition

from settler_streams.settings import Settings

TABLES = (
    "jobs", "executions", "tenant_usage", "tenant_quota_usage", "tenant_signals", "feature_flags", "audit_logs",
    "dead_letters", "tenants", "outbox",
)  # fmt: skip
"""Tables of tenants, read whole; of the result rows only how many each attempt has."""
ROWS_OF_ATTEMPTS = ("matches", "unmatched", "reports")


@dataclass(eq=False)
class Entry:
    """One committed record. ``topic`` is without the deployment's prefix."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]

    @cached_property
    def event(self) -> dict[str, Any]:
        """Its value as plain JSON; empty for what is none."""
        try:
            read = json.loads(self.value or b"")
        except (ValueError, RecursionError):
            return {}
        return read if isinstance(read, dict) else {}

    @property
    def type(self) -> str:
        """The event's type."""
        return str(self.event.get("type", ""))

    @property
    def data(self) -> dict[str, Any]:
        """The event's body."""
        return self.event["data"]  # type: ignore[no-any-return]

    @property
    def tenant(self) -> str:
        """Whom it concerns."""
        return str(self.event["tenantid"])

    @property
    def poison(self) -> bool:
        """Whether the load has made it undecidable."""
        return self.headers.get("chaos-kind", b"").startswith(b"poison")

    @property
    def where(self) -> str:
        """Topic, partition and offset."""
        return f"{self.topic}-{self.partition}@{self.offset}"


Row = dict[str, Any]
Log = dict[int, list[Entry]]


@dataclass
class Recording:
    """All that the checker looks at, and nothing that it can ask a running system for."""

    deployment: str
    partitions: Mapping[str, int]
    logs: dict[str, Log]
    committed: dict[str, dict[tuple[str, int], int]]
    """Per role: Kafka's offsets of its group, by topic and partition."""
    tables: dict[str, list[Row]]
    seen_by: dict[str, dict[str, tuple[int, int]]]
    """Per tenant and table: rows that its own context shows, and how many of them are another's."""
    positions: list[dict[tuple[str, str, int], int]] = field(default_factory=list)
    """Positions in Postgres by consumer, topic and partition, sampled through the round; the last is the final one."""
    acknowledged: frozenset[int] = frozenset()
    """Numbers of the load's records that the broker has acknowledged; only who plants an error has to know."""

    def entries(self, topic: str) -> Iterator[Entry]:
        """A topic's records, partition after partition."""
        for partition in sorted(self.logs[topic]):
            yield from self.logs[topic][partition]

    def of_type(self, topic: str, event_type: str) -> Iterator[Entry]:
        """Those of one event type."""
        return (entry for entry in self.entries(topic) if entry.type == event_type)

    def state(self, role: str) -> dict[tuple[int, str], bytes]:
        """A fold's stored values: the newest of each key and partition."""
        values: dict[tuple[int, str], bytes] = {}
        for entry in self.entries(f"{role}-changelog"):
            key = (entry.partition, (entry.key or b"").decode())
            if entry.value is None:
                values.pop(key, None)
            else:
                values[key] = entry.value
        return values


async def read_logs(settings: Settings, partitions: Mapping[str, int]) -> dict[str, Log]:
    """Every committed record of these topics up to where they end now."""
    prefix = f"{settings.deployment}."
    tps = [TopicPartition(prefix + name, number) for name, count in partitions.items() for number in range(count)]
    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, isolation_level="read_committed",
        enable_auto_commit=False, auto_offset_reset="none", max_partition_fetch_bytes=4 * 2**20,
    )  # fmt: skip
    logs: dict[str, Log] = {name: {number: [] for number in range(count)} for name, count in partitions.items()}
    await consumer.start()
    try:
        ends = await consumer.end_offsets(tps)
        consumer.assign(tps)
        for tp, start in (await consumer.beginning_offsets(tps)).items():
            consumer.seek(tp, start)
        waiting = set(tps)
        while waiting:
            for tp, records in (await consumer.getmany(timeout_ms=200, max_records=20_000)).items():
                name = tp.topic.removeprefix(prefix)
                logs[name][tp.partition] += [
                    Entry(name, r.partition, r.offset, r.timestamp, r.key, r.value, dict(r.headers))
                    for r in records
                    if r.offset < ends[tp]
                ]
            waiting = {tp for tp in waiting if await consumer.position(tp) < ends[tp]}
    finally:
        await consumer.stop()
    return logs


async def read_offsets(settings: Settings, roles: list[str]) -> dict[str, dict[tuple[str, int], int]]:
    """What Kafka holds as the committed offsets of these roles."""
    prefix = f"{settings.deployment}."
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    await admin.start()
    try:
        found = {}
        for role in roles:
            offsets = await admin.list_consumer_group_offsets(f"{prefix}{role}")
            found[role] = {
                (tp.topic.removeprefix(prefix), tp.partition): stored.offset
                for tp, stored in offsets.items()
                if stored.offset >= 0
            }
        return found
    finally:
        await admin.close()


async def read_tables(owner: asyncpg.Connection) -> dict[str, list[Row]]:
    """Every tenant's rows, past row-level security."""
    tables = {}
    for name in TABLES:
        tables[name] = [_plain(row) for row in await owner.fetch(f"SELECT * FROM {name}")]
    for name in ROWS_OF_ATTEMPTS:
        query = f"SELECT tenant_id, job_id, attempt, count(*) AS rows FROM {name} GROUP BY 1, 2, 3"
        tables[name] = [_plain(row) for row in await owner.fetch(query)]
    return tables


async def read_positions(owner: asyncpg.Connection) -> dict[tuple[str, str, int], int]:
    """How far each consumer has come."""
    rows = await owner.fetch("SELECT consumer, topic, partition, next_offset FROM stream_positions")
    return {(row["consumer"], row["topic"], row["partition"]): row["next_offset"] for row in rows}


async def read_as_tenants(app: asyncpg.Connection, tenants: list[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """What the services' role sees in each tenant's context."""
    seen: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for tenant in tenants:
        async with app.transaction():
            await app.execute("SELECT set_config('app.tenant_id', $1, true)", tenant)
            for name in (*TABLES, *ROWS_OF_ATTEMPTS):
                if name == "outbox":  # the services append to it and read nothing
                    continue
                column = "id" if name == "tenants" else "tenant_id"
                query = f"SELECT count(*), count(*) FILTER (WHERE {column} <> $1::text::uuid) FROM {name}"
                seen[tenant][name] = tuple(await app.fetchrow(query, tenant))
    return seen


def _plain(row: asyncpg.Record) -> Row:
    return {name: str(value) if type(value).__name__ == "UUID" else value for name, value in row.items()}
