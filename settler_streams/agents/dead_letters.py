"""The dead-letter agent: an index of the dead letters in Postgres, so that operators find them by tenant and reason.

The bytes stay in Kafka; see :mod:`settler_streams.adapters.kafka.dead_letter_form` for their form.
"""

from __future__ import annotations

from aiokafka.structs import ConsumerRecord

from settler_streams.adapters.kafka import dead_letter_form
from settler_streams.adapters.kafka.dead_letters import DeadLetter
from settler_streams.adapters.postgres.effects import DeadLetter as DeadLetterRow
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.ids import PLATFORM, TenantId, canonical_tenant
from settler_streams.runtime.app import Batches

ROLE = "dead-letters"


async def dead_letters(batches: Batches) -> None:
    """Index whatever has arrived."""
    async for batch in batches:
        async with batch.step() as step:
            for raw in step.raws():
                step.write(effects_of(raw))


def effects_of(raw: ConsumerRecord[bytes, bytes]) -> tuple[Effect, ...]:
    """The index row of one dead letter; a record without our headers did not come from here and has none."""
    headers = {name: value for name, value in raw.headers if value is not None}
    if dead_letter_form.REASON not in headers:
        return ()
    letter = DeadLetter(raw.partition, raw.offset, headers.get(dead_letter_form.KEY), raw.value or b"", headers)
    row = DeadLetterRow(
        tenant_id=_tenant_of(letter.key),
        letter_partition=letter.partition,
        letter_offset=letter.offset,
        role=letter.role,
        reason=letter.reason,
        detail=letter.detail.replace("\0", "\\0"),
        origin_topic=letter.topic,
        origin_partition=letter.origin_partition,
        origin_offset=letter.origin_offset,
        attempts=max(1, letter.attempts),
        refused_at_ms=letter.at_ms,
    )
    return (row,)


def _tenant_of(key: bytes | None) -> TenantId:
    try:
        return canonical_tenant((key or b"").decode())
    except ValueError:
        return PLATFORM
