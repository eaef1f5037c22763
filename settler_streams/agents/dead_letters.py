"""The dead-letter agent: an index of the dead letters in Postgres, so that operators find them by tenant and reason.

The bytes stay in Kafka; see :mod:`settler_streams.adapters.kafka.dead_letter_form` for their form.
"""

from __future__ import annotations

from aiokafka.structs import ConsumerRecord

from settler_streams.adapters.kafka import dead_letter_form as deadletters
from settler_streams.adapters.postgres.effects import DeadLetter, Effect
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
    headers = {name: value.decode(errors="replace") for name, value in raw.headers if value is not None}
    if deadletters.REASON not in headers:
        return ()
    letter = DeadLetter(
        tenant_id=_tenant_of(raw.key),
        letter_partition=raw.partition,
        letter_offset=raw.offset,
        role=headers[deadletters.ROLE],
        reason=headers[deadletters.REASON],
        detail=headers[deadletters.DETAIL].replace("\0", "\\0"),
        origin_topic=headers[deadletters.TOPIC],
        origin_partition=int(headers[deadletters.PARTITION]),
        origin_offset=int(headers[deadletters.OFFSET]),
        attempts=int(headers[deadletters.ATTEMPTS]),
        refused_at_ms=int(headers[deadletters.AT_MS]),
    )
    return (letter,)


def _tenant_of(key: bytes | None) -> TenantId:
    try:
        return canonical_tenant((key or b"").decode())
    except ValueError:
        return PLATFORM
