"""The recorder's batch writer: the effects of a batch and the position after it, in one transaction.

Exactly once follows from the position. A batch commits only if the stored position is still the one its reader started
from, and the same commit moves it; whoever comes second with the same records changes nothing and is fenced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import asyncpg
import msgspec

from settler_streams.adapters.postgres import queries
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.adapters.postgres.failures import refuses_row
from settler_streams.errors import FencedError, RecordError, StateError

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import TenantConnectionPool, Transaction


@dataclass(frozen=True)
class PositionMove:
    """From the position that the batch was read at to the one after it. ``topic_id`` is Kafka's UUID of the topic.

    Raises:
        StateError: the move does not go forward.
    """

    consumer: str
    topic_id: str
    topic: str
    partition: int
    old_next_offset: int
    new_next_offset: int

    def __post_init__(self) -> None:
        if self.new_next_offset <= self.old_next_offset:
            raise StateError(f"{self}: a position only moves forward")


class Position(NamedTuple):
    """Where a consumer goes on in one partition."""

    topic_id: str
    topic: str
    partition: int
    next_offset: int


@dataclass(frozen=True)
class Refused:
    """A record whose effects Postgres does not accept; ``index`` counts the records of the batch from 0."""

    index: int
    error: RecordError


RecordEffects = Sequence[Effect]
"""What one record changes: applied together or not at all. Empty for a record without effect."""


async def write_batch(pool: TenantConnectionPool, move: PositionMove, records: Sequence[RecordEffects]) -> None:
    """Write the effects of a batch and move the position, or change nothing.

    1. Compare and set the position.
    2. Send the effects of all tenants in one call, each tenant's under its own context.
    3. Commit both.

    Raises:
        FencedError: the stored position is not the old one: another owner was faster.
        RecordError: a record of the batch is refused; :func:`bisect` finds it and writes the others.
        UnavailableError: the server failed. After a lost commit the position says which way it went.
    """
    async with pool.platform() as transaction:
        await _move_position(transaction, move)
        await _project(transaction, records)


async def bisect(
    pool: TenantConnectionPool,
    move: PositionMove,
    records: Sequence[RecordEffects],
    dead_letter: Callable[[Sequence[Refused]], Awaitable[None]],
) -> list[Refused]:
    """Write the effects of every record that Postgres accepts, and move the position past all of them.

    Halves that are refused are halved again, each inside a savepoint: about ``2 k log2(n)`` calls for k refused
    records of n. ``dead_letter`` is awaited before the commit, so a crash may repeat a dead letter but never lose one.

    Returns:
        The refused records, in order; what was given to ``dead_letter``, which is not called for none.

    Raises:
        FencedError, UnavailableError: as :func:`write_batch`; nothing was changed, though dead letters may be out.
    """
    async with pool.platform() as transaction:
        await _move_position(transaction, move)
        refused = await _project_or_halve(transaction, records, first_index=0)
        if refused:
            await dead_letter(refused)
    return refused


async def read_positions(pool: TenantConnectionPool, consumer: str) -> list[Position]:
    """Every stored position of ``consumer``."""
    async with pool.platform() as transaction:
        rows = await transaction.fetch(queries.READ_POSITIONS, consumer)
    return [Position(str(topic_id), *rest) for topic_id, *rest in rows]


async def init_position(
    pool: TenantConnectionPool, consumer: str, topic_id: str, topic: str, partition: int, next_offset: int = 0
) -> int:
    """Store a first position unless there is one.

    Returns:
        The stored position: ``next_offset`` when it is new.

    Raises:
        StateError: the consumer has a position in a topic of the same name with another id. The topic was deleted
            and made again; its offsets mean something else now, and someone has to decide what that means.
    """
    async with pool.platform() as transaction:
        await transaction.execute(queries.INSERT_POSITION, consumer, topic_id, topic, partition, next_offset)
        rows = await transaction.fetch(queries.READ_POSITION, consumer, topic, partition)
        if len(rows) != 1:
            raise StateError(
                f"topic {topic!r} was re-created: {consumer} has a position in an earlier one of that name"
            )
        return int(rows[0]["next_offset"])


async def _move_position(transaction: Transaction, move: PositionMove) -> None:
    moved = await transaction.fetchval(
        queries.MOVE_POSITION,
        move.consumer,
        move.topic_id,
        move.partition,
        move.old_next_offset,
        move.new_next_offset,
    )
    if not moved:
        raise FencedError(f"{move}: the stored position is another one; another owner of the partition has moved it")


async def _project(transaction: Transaction, records: Sequence[RecordEffects]) -> None:
    batch: dict[str, dict[str, list[Effect]]] = {}
    for effects in records:
        for effect in effects:
            batch.setdefault(effect.tenant_id, {}).setdefault(effect.KIND, []).append(effect)
    if not batch:
        return
    try:
        encoded = msgspec.json.encode(batch).decode()
    except (ValueError, OverflowError) as error:  # a lone surrogate; an integer beyond 64 bits
        raise RecordError("not-encodable", str(error)) from error
    try:
        await transaction.execute(queries.PROJECT_BATCH, encoded)
    except asyncpg.PostgresError as error:
        if refuses_row(error):
            raise RecordError(f"postgres-{error.sqlstate}", str(error)) from error
        raise


async def _project_or_halve(
    transaction: Transaction, records: Sequence[RecordEffects], first_index: int
) -> list[Refused]:
    try:
        async with transaction.transaction():
            await _project(transaction, records)
    except RecordError as error:
        if len(records) == 1:
            return [Refused(first_index, error)]
    else:
        return []
    middle = len(records) // 2
    return [
        *await _project_or_halve(transaction, records[:middle], first_index),
        *await _project_or_halve(transaction, records[middle:], first_index + middle),
    ]
