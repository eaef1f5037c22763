"""A step: all of it or nothing, and the same again when it is done again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest
import pytest_asyncio
from aiokafka.structs import TopicPartition

from settler_streams import __version__
from settler_streams.core.fold import FoldClock
from settler_streams.errors import StateError, UnavailableError
from settler_streams.events import StepJournal, TenantAcknowledged, decode
from settler_streams.runtime.session import BARRIER_KEY, Session
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.counter import UNLUCKY, WIDE, Sum, arrived, fold, spec_of, tenant_in, usage
from tests.runtime.kafka_log import KafkaLog

pytestmark = pytest.mark.services

Open = Callable[[], Awaitable[Session]]
_free = iter(range(counter.PARTITIONS))


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


@pytest.fixture
def partition() -> int:
    """A fold that no other test has touched."""
    return next(_free)


@pytest_asyncio.fixture
async def opened(log: KafkaLog, partition: int) -> AsyncIterator[Open]:
    """Opens sessions of the test's fold."""
    sessions: list[Session] = []

    async def open_session() -> Session:
        session = Session(spec_of(log), partition)
        sessions.append(session)
        await session.open()
        return session

    yield open_session
    for session in sessions:
        await session.close()


async def test_a_step_commits_outputs_state_journal_and_offsets_together(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    tenant, other = tenant_in(partition), tenant_in(partition, 1)
    events = [usage(tenant, 3), usage(other, 5), usage(tenant, 4), usage(tenant, UNLUCKY), usage(tenant, 6)]
    await log.append("usage-events", partition, events)
    session = await opened()
    records = await arrived(log, session)
    ((_, raws),) = records.items()
    now_ms = max(raw.timestamp for raw in raws)

    await fold(session, records)

    outputs = [(event.tenantid, event.data) for event in await log.events("sums", [partition])]
    assert outputs == [
        (tenant, TenantAcknowledged(version=1)),
        (other, TenantAcknowledged(version=1)),
        (tenant, TenantAcknowledged(version=2)),
        (tenant, TenantAcknowledged(version=3)),
    ]
    changelog = await log.read("counter-changelog", [partition])
    stored = {record.key.decode(): session.codec.decode(record.key.decode(), record.value) for record in changelog}
    assert len(changelog) == 3, "one record for each touched key, however often it was touched"
    assert stored == {
        f"sum/{tenant}": Sum(13, 3),
        f"sum/{other}": Sum(5, 1),
        "clock/": FoldClock(now_ms, {"usage-events": 5}, session.topic_ids),
    }
    (journal,) = [event.data for event in await log.events("counter-journal", [partition])]
    assert isinstance(journal, StepJournal)
    ((run),) = journal.runs
    assert (run.topic, run.first, run.last, run.records) == (log.full("usage-events"), 0, 4, 5)
    assert (journal.role, journal.partition, journal.now_ms) == ("counter", partition, now_ms)
    assert (journal.outputs, journal.code_version) == (4, __version__)
    (letter,) = await log.read("dead-letters", [partition])
    assert letter.value == events[3][1]
    await log.until_committed("counter", "usage-events", partition, 5)
    assert session.positions == {TopicPartition(log.full("usage-events"), partition): 5}


async def test_an_aborted_step_leaves_nothing_and_its_repetition_is_equal_to_the_byte(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    await log.append("usage-events", partition, [usage(tenant_in(partition), quantity) for quantity in (3, UNLUCKY, 4)])
    first = await opened()
    records = await arrived(log, first)
    before = dict(first.state)

    async def unknown_outcome() -> None:
        raise UnavailableError("the broker's answer was lost")

    first.commit = unknown_outcome  # type: ignore[method-assign]
    with pytest.raises(UnavailableError):
        await fold(first, records)
    topics = ("sums", "counter-changelog", "counter-journal", "dead-letters")
    assert [await log.read(topic, [partition]) for topic in topics] == [[], [], [], []]
    assert await log.committed_offsets("counter", "usage-events", partition) is None
    assert dict(first.state) == before

    second = await opened()
    await fold(second, await arrived(log, second))

    for topic in topics:
        everything = await log.read(topic, [partition], isolation="read_uncommitted")
        records_of = [(r.key, r.value, r.headers) for r in everything if r.key != BARRIER_KEY]
        half = len(records_of) // 2
        assert half > 0
        assert records_of[:half] == records_of[half:], topic
        assert [(r.key, r.value, r.headers) for r in await log.read(topic, [partition])] == records_of[half:]
    ids = [decode(record.value).id for record in await log.read("sums", [partition])]
    assert len(set(ids)) == 2


async def test_an_exception_in_the_agent_aborts(log: KafkaLog, opened: Open, partition: int) -> None:
    await log.append("usage-events", partition, [usage(tenant_in(partition))])
    session = await opened()
    records = await arrived(log, session)

    async def failing_agent() -> None:
        async with session.new_step(records) as step:
            for record in step.decode():
                outcome = step.decide(session.logic, record)
                step.apply(outcome)
                step.publish(outcome)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing_agent()

    assert session.lost
    assert dict(session.state) == {}
    assert await log.read("sums", [partition], isolation="read_uncommitted") == []
    assert await log.committed_offsets("counter", "usage-events", partition) is None


async def test_an_output_that_the_broker_refuses_commits_nothing(log: KafkaLog, opened: Open, partition: int) -> None:
    """The client alone would commit here: its transaction ends well although a produce in it has failed."""
    tenant = tenant_in(partition)
    await log.append("usage-events", partition, [usage(tenant, 3), usage(tenant, WIDE), usage(tenant, 4)])
    session = await opened()

    with pytest.raises(UnavailableError, match="MessageSizeTooLarge"):
        await fold(session, await arrived(log, session))

    assert session.lost
    assert dict(session.state) == {}
    topics = ("sums", "counter-changelog", "counter-journal", "dead-letters")
    assert [await log.read(topic, [partition]) for topic in topics] == [[], [], [], []]
    assert len(await log.read("counter-journal", [partition], isolation="read_uncommitted")) == 1, "it was sent"
    assert await log.committed_offsets("counter", "usage-events", partition) is None


async def test_offsets_are_added_only_when_every_send_was_answered(log: KafkaLog, opened: Open, partition: int) -> None:
    await log.append("usage-events", partition, [usage(tenant_in(partition))])
    session = await opened()
    records = await arrived(log, session)
    answered: list[bool] = []
    sends: list[asyncio.Future[object]] = []
    send_batch, add_offsets = session.producer.send_batch, session.add_offsets

    async def recorded(*args: object, **kwargs: object) -> asyncio.Future[object]:
        sends.append(await send_batch(*args, **kwargs))
        return sends[-1]

    async def checked(positions: Mapping[TopicPartition, int]) -> None:
        answered.extend(send.done() for send in sends)
        await add_offsets(positions)

    session.producer.send_batch = recorded
    session.add_offsets = checked  # type: ignore[method-assign]
    await fold(session, records)

    assert answered == [True, True, True]  # outputs, changelog, journal


async def test_a_lost_session_takes_no_further_step(log: KafkaLog, opened: Open, partition: int) -> None:
    """Its logic may have seen records whose transaction was aborted, so its decisions are worth nothing."""
    await log.append("usage-events", partition, [usage(tenant_in(partition))])
    session = await opened()
    records = await arrived(log, session)
    with pytest.raises(ZeroDivisionError):
        async with session.new_step(records):
            raise ZeroDivisionError
    with pytest.raises(StateError, match="lost"):
        await fold(session, records)
    assert await log.read("sums", [partition]) == []


async def test_records_that_were_consumed_are_refused(log: KafkaLog, opened: Open, partition: int) -> None:
    await log.append("usage-events", partition, [usage(tenant_in(partition))])
    session = await opened()
    records = await arrived(log, session)
    await fold(session, records)
    with pytest.raises(StateError, match="stand at 1"):
        session.new_step(records)


async def test_a_tenants_order_is_kept_across_steps(log: KafkaLog, opened: Open, partition: int) -> None:
    tenants = [tenant_in(partition, number) for number in range(5)]
    session = await opened()
    for _ in range(4):
        await log.append("usage-events", partition, [usage(tenant) for tenant in tenants * 50])
        await fold(session, await arrived(log, session))
    said: dict[str, list[int]] = {}
    for event in await log.events("sums", [partition]):
        assert isinstance(event.data, TenantAcknowledged)
        said.setdefault(event.tenantid, []).append(event.data.version)
    assert said == {tenant: list(range(1, 201)) for tenant in tenants}
