"""A fold small enough to check by hand: it adds up what each tenant used, and says the sum after every record."""

from __future__ import annotations

import datetime as dt
from typing import ClassVar

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.core.fold import NOTHING, Emit, FoldClock, Outcome, Record, State, Value, value_of
from settler_streams.errors import RecordError
from settler_streams.events import Resource, TenantAcknowledged, UsageRecorded, encode, envelope
from settler_streams.ids import TenantId, partition_of, uuid7
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.step import Records
from settler_streams.topology import Topology
from tests.runtime.kafka_log import KafkaLog

PARTITIONS = 8
UNLUCKY = 13
"""The core refuses this quantity."""
WIDE = 14
"""An output of this quantity is larger than its topic takes."""
FORGET = 15
"""The tenant's sum is deleted."""

TOPOLOGY = Topology.model_validate(
    {
        "version": 1,
        "tenant_partitions": PARTITIONS,
        "worker_pools": 1,
        "topics": [
            {
                "name": "usage-events",
                "key": "root-tenant",
                "partitions": "tenants",
                "retention": "7d",
                "events": ["settler.usage.recorded.v1"],
                "writers": ["producer"],
                "readers": ["counter"],
            },
            {
                "name": "sums",
                "key": "root-tenant",
                "partitions": "tenants",
                "retention": "7d",
                "max_message_bytes": 300000,
                "events": ["settler.tenant.acknowledged.v1"],
                "writers": ["counter"],
                "readers": ["consumer"],
            },
            {
                "name": "dead-letters",
                "key": "partition",
                "partitions": "tenants",
                "retention": "30d",
                "max_message_bytes": 4194304,
                "events": [],
                "writers": ["counter"],
                "readers": ["operator"],
            },
        ],
        "folds": [{"role": "counter", "inputs": ["usage-events"]}],
        "projections": [],
    }
)


class Sum(Value, frozen=True, array_like=True):
    """What one tenant used, and in how many records."""

    total: int
    records: int


class Counter:
    """The fold's logic."""

    kinds: ClassVar[dict[str, type[Value]]] = {"clock": FoldClock, "sum": Sum}

    def __init__(self, state: State, _partition: int) -> None:
        self._state = state

    def decide(self, record: Record, _now_ms: int) -> Outcome:
        """Add, and say the sum."""
        used = record.event.data
        if not isinstance(used, UsageRecorded):
            return NOTHING
        if used.quantity == UNLUCKY:
            raise RecordError("unlucky", "this quantity is refused")
        tenant = record.event.tenantid
        key = f"sum/{tenant}"
        if used.quantity == FORGET:
            return Outcome({key: None})
        before = value_of(self._state, key, Sum) or Sum(0, 0)
        after = Sum(before.total + used.quantity, before.records + 1)
        output_key = "k" * 700_000 if used.quantity == WIDE else record.key
        said = TenantAcknowledged(version=after.records)
        return Outcome({key: after}, (Emit("sums", said, tenant, output_key, "sum", partition=record.partition),))


def spec_of(log: KafkaLog) -> FoldSpec:
    """What the counter's sessions have in common."""
    return FoldSpec(
        declared=TOPOLOGY.fold("counter"),
        topology=TOPOLOGY,
        cluster=Cluster.of(log.settings),
        deployment=log.settings.deployment,
        kinds=Counter.kinds,
        new_logic=Counter,
        router=Router(TOPOLOGY),
    )


def tenant_in(partition: int, number: int = 0, partitions: int = PARTITIONS) -> TenantId:
    """The ``number``-th tenant whose records live in ``partition``."""
    at = 0
    for candidate in range(1, 1_000_000):
        tenant = TenantId(f"00000000-0000-4000-8000-{candidate:012x}")
        if partition_of(tenant, partitions) == partition:
            if at == number:
                return tenant
            at += 1
    raise AssertionError("unreachable: the hash spreads tenants over all partitions")


def usage(tenant: TenantId, quantity: int = 1, event_id: str | None = None) -> tuple[bytes, bytes]:
    """Key and value of one usage event."""
    now = dt.datetime.now(dt.UTC)
    event_id = event_id or uuid7(int(now.timestamp() * 1000))
    body = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=quantity)
    return tenant.encode(), encode(envelope(body, event_id=event_id, source="/test", tenant=tenant, time=now))


async def arrived(log: KafkaLog, session: Session) -> Records:
    """What lies beyond the session's positions: a batch as the runner would fetch it."""
    async with log.consumer() as consumer:
        tps = list(session.positions)
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        batch: dict[object, list[object]] = {}
        for tp, position in session.positions.items():
            consumer.seek(tp, position)
        while any([await consumer.position(tp) < ends[tp] for tp in tps]):
            for tp, records in (await consumer.getmany(timeout_ms=100)).items():
                batch.setdefault(tp, []).extend(records)
    return batch  # type: ignore[return-value]


async def fold(session: Session, records: Records) -> None:
    """One step, as an agent does it."""
    async with session.new_step(records) as step:
        for record in step.decode():
            outcome = step.decide(session.logic, record)
            step.apply(outcome)
            step.publish(outcome)
