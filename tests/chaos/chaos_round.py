"""One round: start, load, faults, drain, then read everything and check it."""

from __future__ import annotations

import asyncio
import sys

import asyncpg
from aiokafka.errors import KafkaError

from tests.chaos import checker
from tests.chaos.field_of_work import EXECUTORS, WORKERS, Field
from tests.chaos.pace import observe, observe_advance
from tests.chaos.recording import Recording, read_as_tenants, read_logs, read_offsets, read_positions, read_tables
from tests.chaos.watch import Place

READY_S_MAX = 150.0
DRAIN_S_MAX = 60.0
"""Longest stand-still once nothing disturbs any more: an executor that was lost is noticed after ten seconds, a step
that waits for a broker gives up after thirty, and then a worker has to start."""

UNKNOWN = sys.maxsize
"""What is left while the broker does not say."""


async def begin(field: Field) -> float:
    """Wait until the fleet decides and jobs finish."""

    async def at_work() -> bool:
        return bool(field.watch.finished)

    return await observe("the first results", at_work, READY_S_MAX)


async def drain(field: Field, patience_s: float = DRAIN_S_MAX) -> None:
    """Stop the load, let everything come to its end, and stop the processes in order.

    Raises:
        NotObservedError: something has stood still for longer than ``patience_s``.
    """
    await field.stop_load()
    sent = {s.id for s in field.load.ledger.values() if s.topic == "job-requests" and s.stored and _is_request(s.kind)}

    async def left() -> int:
        return len(sent - field.watch.decided.keys()) + len(field.watch.open_jobs())

    def missing() -> str:
        undecided, unfinished = sent - field.watch.decided.keys(), field.watch.open_jobs()
        return (
            f"undecided {len(undecided)} {sorted(undecided)[:2]}, unfinished {len(unfinished)} {sorted(unfinished)[:2]}"
        )

    await observe_advance("jobs to be decided and finished", left, patience_s, missing)
    for name in (*EXECUTORS, "gateway"):
        field.fleet.members[name].wanted = False
        await field.fleet.replace(name)
    field.start_recorder()
    await consumed(field, dict(field.watch.last), patience_s)
    await consumed(field, await next_ticks(field, patience_s), patience_s)  # then the last sums and reports are told
    for name in WORKERS:
        field.fleet.members[name].wanted = False
    await asyncio.gather(*(field.fleet.replace(name) for name in WORKERS))


def _is_request(kind: str) -> bool:
    return kind in ("plain", "newer", "misplaced", "duplicate")


async def next_ticks(field: Field, patience_s: float) -> dict[Place, int]:
    """Wait for a tick in every place that has had one: it is told to whoever has read all that was there before."""
    before = dict(field.watch.ticks)

    async def left() -> int:
        return sum(field.watch.ticks[place] <= offset for place, offset in before.items())

    await observe_advance("another tick in every partition", left, patience_s)
    return dict(field.watch.ticks)


async def consumed(field: Field, marks: dict[Place, int], patience_s: float) -> None:
    """Wait until every fold has committed these records."""

    async def left() -> int:
        try:
            return sum((await field.watch.behind(marks)).values())
        except (KafkaError, TimeoutError):
            return UNKNOWN  # no answer is no advance

    await observe_advance("records to be read by folds", left, patience_s)


async def record(field: Field, *, complete: bool = True) -> Recording:
    """Read it all; if it is to be complete, once the projections have reached ends that no fold moves any more."""
    if not complete:
        await field.fleet.stop()
    logs = await read_logs(field.settings, checker.topics())
    ends = {
        (f"{field.deployment}.{role}", f"{field.deployment}.{topic}", partition): entries[-1].offset + 1
        for role, inputs in checker.projection_inputs().items()
        for topic in inputs
        for partition, entries in logs[topic].items()
        if entries
    }
    owner = await field.owner()
    try:

        async def left() -> int:
            stored = await read_positions(owner)
            return sum(max(0, end - stored.get(place, 0)) for place, end in ends.items())

        if complete:
            await observe_advance("records to be projected", left, DRAIN_S_MAX)
        await field.fleet.stop()
        field.positions.append(await read_positions(owner))
        tables = await read_tables(owner)
    finally:
        await owner.close()
    app = await asyncpg.connect(field.settings.postgres_url())
    try:
        seen_by = await read_as_tenants(app, [tenant.id for tenant in field.tenants.values()])
    finally:
        await app.close()
    committed = await read_offsets(field.settings, list(checker.fold_inputs()))
    return Recording(field.deployment, checker.topics(), logs, committed, tables, seen_by, field.positions)
