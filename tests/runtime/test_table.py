"""A role's state as a Faust table: ordinary to read, written in a step and nowhere else, stored by the step alone."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import faust
import pytest
import pytest_asyncio
from faust.types import TableT

from settler_streams.core.fold import CLOCK_KEY, FoldClock
from settler_streams.events import UsageRecorded
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.apps import running
from tests.runtime.counter import PARTITIONS, Sum, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog, Record
from tests.runtime.members import Worker, last_folded

pytestmark = pytest.mark.services


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


async def test_it_is_a_faust_table_over_the_folds_that_the_worker_owns(log: KafkaLog) -> None:
    tenants = [tenant_in(partition) for partition in range(PARTITIONS)]
    offsets = [await log.append("usage-events", p, [usage(tenant, p + 1)]) for p, tenant in enumerate(tenants)]
    worker = Worker(log)
    table = worker.table
    assert isinstance(table, faust.Table)
    assert isinstance(table, TableT)
    assert worker.app.tables["counter"] is table
    assert worker.app.tables.changelog_topics == {log.full("counter-changelog")}
    assert len(table) == 0, "nothing is owned before the start"
    async with running([worker.app]):
        await log.until("counter-journal", all_folded(offsets))
        await worker.owns(lambda n: n == PARTITIONS)
        async with asyncio.timeout(WAIT_S_MAX):  # the journal shows before the commit has been answered
            while sum(f"sum/{tenant}" in table for tenant in tenants) < PARTITIONS:
                await asyncio.wait([worker.app.failure], timeout=0.02)
        assert {t: table[f"sum/{t}"] for t in tenants} == {t: Sum(p + 1, 1) for p, t in enumerate(tenants)}
        assert set(table) == {CLOCK_KEY, *(f"sum/{tenant}" for tenant in tenants)}
        assert len(table) == len(set(table)) == len(table.items())
        assert table.get("sum/nobody") is None
        assert list(table.partition(2)) == [f"sum/{tenants[2]}", CLOCK_KEY]
        assert isinstance(table.partition(2)[CLOCK_KEY], FoldClock)
        assert "sum/" in table.as_ansitable()
    assert len(table) == 0, "what is no longer owned is no longer shown"
    with pytest.raises(KeyError):
        table.partition(2)


async def test_an_agent_may_keep_its_state_by_the_table_alone(log: KafkaLog, settings: Settings) -> None:
    """As any Faust agent does: read, write, and find it again in the next step and after a restart."""
    other = await another(log, settings, "table")
    tenant = tenant_in(3)
    seen: list[tuple[int, int]] = []

    async def agent(batches: Any) -> None:
        table = batches.app.tables["counter"]
        async for batch in batches:
            async with batch.step() as step:
                for record in step.decode():
                    used = record.event.data
                    assert isinstance(used, UsageRecorded)
                    key = f"sum/{record.event.tenantid}"
                    before = table.get(key) or Sum(0, 0)
                    table[key] = Sum(before.total + used.quantity, before.records + 1)
                    table.update({"sum/gone": Sum(1, 1)})
                    del table["sum/gone"]
                    assert "sum/gone" not in table
                    seen.append((table[key].total, table[key].records))
            with pytest.raises(TypeError, match="inside a step"):
                table["sum/outside"] = Sum(1, 1)

    for quantity in (3, 4):
        async with running([Worker(other, agent).app]):
            offset = await other.append("usage-events", 3, [usage(tenant, quantity)] * 2)
            await other.until("counter-journal", lambda records, last=offset[-1]: last_folded(records, 3) >= last)
    assert seen == [(3, 1), (6, 2), (10, 3), (14, 4)]
    assert await stored(other, 3) == {f"sum/{tenant}": Sum(14, 4)}


@pytest.mark.parametrize(
    "write",
    [
        lambda table: table.__setitem__("sum/x", Sum(1, 1)),
        lambda table: table.update({"sum/x": Sum(1, 1)}),
        lambda table: table.setdefault("sum/y", Sum(1, 1)),
        lambda table: table.__delitem__("sum/x"),
        lambda table: table.clear(),
        lambda table: table.reset_state(),
        lambda table: table.send_changelog(0, "sum/x", Sum(1, 1)),
        lambda table: table.apply_changelog_batch([]),
        lambda table: table.tumbling(10.0),
        lambda table: table.hopping(10.0, 5.0),
        lambda table: table.data.__setitem__("sum/x", Sum(1, 1)),
    ],
)
async def test_nothing_writes_outside_a_step(log: KafkaLog, write: Callable[[Any], None]) -> None:
    state = Overlay()
    state.load("sum/x", Sum(7, 7))
    worker = Worker(log)
    worker.table._open_states = lambda: {0: state}
    with pytest.raises(TypeError):
        write(worker.table)
    assert dict(worker.table) == {"sum/x": Sum(7, 7)}


async def test_a_value_of_the_wrong_kind_stops_the_worker_and_is_not_stored(log: KafkaLog, settings: Settings) -> None:
    """It could not be loaded again; better that the step which puts it fails."""
    other = await another(log, settings, "kind")
    errors: list[BaseException] = []

    async def agent(batches: Any) -> None:
        async for batch in batches:
            async with batch.step() as step:
                for _record in step.decode():
                    try:
                        batches.app.tables["counter"]["sum/x"] = FoldClock(1)
                    except TypeError as error:
                        errors.append(error)
                        raise

    worker = Worker(other, agent)
    await other.append("usage-events", 1, [usage(tenant_in(1))])
    async with asyncio.timeout(60):
        await worker.app.start()
        await asyncio.wait([worker.app.failure])
        await worker.app.stop()
    assert "no value for the key" in str(errors[0])
    assert await stored(other, 1) == {}


async def test_readers_see_the_committed_values_until_the_step_has_committed(log: KafkaLog, settings: Settings) -> None:
    other = await another(log, settings, "seen")
    tenant = tenant_in(5)
    during: list[Any] = []

    async def agent(batches: Any) -> None:
        table = batches.app.tables["counter"]

        async def reader() -> None:
            during.append((table.get(f"sum/{tenant}"), table.partition(5).get(f"sum/{tenant}")))

        async for batch in batches:
            async with batch.step() as step:
                for record in step.decode():
                    step.apply(step.decide(batch.logic, record))
                await outside(reader)
                during.append(table[f"sum/{tenant}"])

    async with running([Worker(other, agent).app]):
        for quantity in (3, 4):
            offset = await other.append("usage-events", 5, [usage(tenant, quantity)])
            await other.until("counter-journal", lambda records, last=offset[-1]: last_folded(records, 5) >= last)
    assert during == [(None, None), Sum(3, 1), (Sum(3, 1), Sum(3, 1)), Sum(7, 2)]


async def outside(work: Callable[[], Any]) -> None:
    """Run ``work`` as something else in this process would: in no agent's context."""
    await asyncio.create_task(work(), context=contextvars.Context())


async def another(log: KafkaLog, settings: Settings, name: str) -> KafkaLog:
    other = KafkaLog(settings.model_copy(update={"deployment": f"{settings.deployment[:30]}-{name}"}), log.topology)
    await other.create()
    return other


def all_folded(offsets: list[list[int]]) -> Callable[[list[Record]], bool]:
    return lambda records: all(last_folded(records, p) >= offset for p, (offset,) in enumerate(offsets))


async def stored(log: KafkaLog, partition: int) -> dict[str, Any]:
    """What a new owner would load, without its clock."""
    codec = StateCodec(counter.Counter.kinds)
    values: dict[str, Any] = {}
    for record in await log.read("counter-changelog", [partition]):
        key = record.key.decode()
        values[key] = None if record.value is None else codec.decode(key, record.value)
    return {key: value for key, value in values.items() if value is not None and key != CLOCK_KEY}
