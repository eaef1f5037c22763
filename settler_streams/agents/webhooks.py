"""The webhooks agent: what tenants may hear of is queued in Postgres, once for each webhook that wants it.

Each batch is one transaction per input partition, together with the position behind it. Sending is for couriers.
"""

from __future__ import annotations

from aiokafka.structs import ConsumerRecord

from settler_streams.adapters.postgres.effects import Effect, WebhookEvent
from settler_streams.core.fold import Record
from settler_streams.core.webhooks import PUBLIC_BODIES
from settler_streams.ids import PLATFORM
from settler_streams.runtime.app import Batches

ROLE = "webhooks"


async def webhooks(batches: Batches) -> None:
    """Queue whatever has arrived."""
    async for batch in batches:
        async with batch.step() as step:
            for record in step.decode():
                step.write(effects_of(record, step.raw))


def effects_of(record: Record, raw: ConsumerRecord[bytes, bytes]) -> tuple[Effect, ...]:
    """The event with its bytes as they lie in Kafka, if it is for tenants; which of their webhooks want it, Postgres
    knows."""
    event = record.event
    if type(event.data) not in PUBLIC_BODIES or event.tenantid == PLATFORM or raw.value is None:
        return ()
    queued = WebhookEvent(
        tenant_id=event.tenantid,
        event_id=event.id,
        event_type=event.type,
        body=raw.value.decode(),
        appended_at_ms=raw.timestamp,
        source_version=record.offset,
    )
    return (queued,)
