"""The transport at work: members of a group share the folds, hand them over, and stay members."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio

from settler_streams.runtime.app import Batches
from settler_streams.runtime.session import Session
from settler_streams.runtime.transport import ConsumerThread
from settler_streams.settings import Settings
from settler_streams.workers.run import EXIT_ERROR, EXIT_FENCED, EXIT_STATE, run
from tests.runtime import counter
from tests.runtime.apps import running
from tests.runtime.counter import spec_of, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog, Record
from tests.runtime.members import Worker, idle, last_folded, moved, positions, signals_restored, steady_load

pytestmark = pytest.mark.services

Work = Callable[[Any], Coroutine[Any, Any, object]]

MAX_POLL_S = 4.0
"""A worker says that it is alive each second: a machine that holds it up for three is still none that has lost it."""


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics, in one deployment for all tests of this module."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


async def test_two_members_share_the_folds_and_one_takes_over_when_the_other_stops(log: KafkaLog) -> None:
    """Requests come all the time; each is folded once, whoever owns its fold at that moment."""
    sent: Counter[int] = Counter()
    async with steady_load(log, sent), contextlib.AsyncExitStack() as stack:
        first = Worker(log)
        await stack.enter_async_context(running([first.app]))
        assert await first.owns(lambda n: n == counter.PARTITIONS) == set(range(counter.PARTITIONS))
        alone = {partition: sessions[-1] for partition, sessions in first.sessions.items()}
        async with running([(second := Worker(log)).app]):
            theirs = await second.owns(lambda n: n == counter.PARTITIONS // 2)
            ours = await first.owns(lambda n: n == counter.PARTITIONS - len(theirs))
            assert ours | theirs == set(range(counter.PARTITIONS))
            assert ours.isdisjoint(theirs)
            for partition in ours:
                assert first.sessions[partition] == [alone[partition]], "a fold that stays keeps its session"
                assert not alone[partition].lost
            before = await positions(log)
            await log.until("counter-journal", lambda records: moved(records, before))
        await first.owns(lambda n: n == counter.PARTITIONS)
        for partition in theirs:
            assert len(first.sessions[partition]) == 2, "a fold that came back was loaded again"
        before = await positions(log)
        await log.until("counter-journal", lambda records: moved(records, before))
    await every_record_was_folded_once(log, sent)


async def test_a_member_that_only_waits_stays_in_the_group(log: KafkaLog) -> None:
    """More members than folds: whoever has none is still there when it is needed, long after its last record."""
    worker = Worker(log)
    worker.app.conf.broker_max_poll_interval = MAX_POLL_S
    async with running([worker.app]):
        await worker.owns(lambda n: n == counter.PARTITIONS)
        loop = asyncio.get_running_loop()
        until = loop.time() + 2 * MAX_POLL_S
        folded = 0
        tenant = tenant_in(0)
        while loop.time() < until or folded < 3:
            (offset,) = await log.append("usage-events", 0, [usage(tenant)])
            await log.until("counter-journal", lambda records, offset=offset: last_folded(records, 0) >= offset)
            folded += 1
            await idle(worker.app, MAX_POLL_S / 2)
        assert await worker.owns(lambda n: n == counter.PARTITIONS)


async def test_a_stop_in_the_middle_of_a_rebalance_is_no_failure(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the consumer's thread, which is asked each second to say that the member is alive, does not answer."""
    asked, in_thread = asyncio.Event(), ConsumerThread.in_thread

    async def unanswered(thread: ConsumerThread, work: Work) -> object:
        if work.__name__ == "alive":
            asked.set()
            await asyncio.Event().wait()
        return await in_thread(thread, work)

    async with running([(worker := Worker(log)).app]):
        await worker.owns(lambda n: n == counter.PARTITIONS)
        monkeypatch.setattr(ConsumerThread, "in_thread", unanswered)
        await asked.wait()
        worker.app.rebalancing = True
        await worker.app.stop()
        assert not worker.app.failure.done()


async def test_an_exception_in_an_agent_ends_the_worker_and_its_batch_is_folded_after_the_restart(
    log: KafkaLog,
) -> None:
    async def failing(batches: Batches) -> None:
        async for batch in batches:
            async with batch.step() as step:
                for record in step.decode():
                    outcome = step.decide(batch.logic, record)
                    step.apply(outcome)
                    step.publish(outcome)
                raise ZeroDivisionError

    offsets = [await log.append("usage-events", partition, [usage(tenant_in(partition))]) for partition in (2, 5)]
    before = await log.read("sums")
    stood = [await log.committed_offsets("counter", "usage-events", partition) for partition in (2, 5)]
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        assert await run([Worker(log, failing).app]) == EXIT_ERROR
    assert await log.read("sums") == before
    assert [await log.committed_offsets("counter", "usage-events", partition) for partition in (2, 5)] == stood

    async with running([Worker(log).app]):
        for partition, (offset,) in zip((2, 5), offsets, strict=True):
            await log.until("counter-journal", lambda r, p=partition, o=offset: last_folded(r, p) >= o)
    assert len(await log.read("sums")) == len(before) + 2


async def test_a_fenced_worker_says_so_in_its_exit_code(log: KafkaLog) -> None:
    """Another owner of one fold opens while the group still counts this worker as its owner."""
    worker = Worker(log)
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        ended = asyncio.create_task(run([worker.app]))
        await worker.owns(lambda n: n == counter.PARTITIONS)
        usurper = Session(spec_of(log), 3)
        await usurper.open()
        await log.append("usage-events", 3, [usage(tenant_in(3))])
        assert await ended == EXIT_FENCED
        await usurper.close()


async def test_a_state_that_cannot_be_read_has_an_exit_code_of_its_own(log: KafkaLog, settings: Settings) -> None:
    other = KafkaLog(settings.model_copy(update={"deployment": f"{settings.deployment[:30]}-state"}), log.topology)
    await other.create()
    await other.append("counter-changelog", 1, [(b"nonsense/1", b"?")])
    async with signals_restored(), asyncio.timeout(2 * WAIT_S_MAX):
        assert await run([Worker(other).app]) == EXIT_STATE


async def every_record_was_folded_once(log: KafkaLog, sent: Counter[int]) -> None:
    inputs = await log.read("usage-events")
    ends = {partition: max(r.offset for r in inputs if r.partition == partition) for partition in sent}

    def all_folded(journal: list[Record]) -> bool:
        return all(last_folded(journal, partition) >= end for partition, end in ends.items())

    async with running([Worker(log).app]):
        await log.until("counter-journal", all_folded)
    said: dict[str, list[int]] = {}
    for event in await log.events("sums"):
        said.setdefault(event.tenantid, []).append(event.data.version)  # type: ignore[attr-defined]
    assert {t: versions for t, versions in said.items() if versions != list(range(1, len(versions) + 1))} == {}
    assert sum(len(versions) for versions in said.values()) == len(inputs)
