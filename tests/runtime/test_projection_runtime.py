"""A projection: rows and the position behind them move together, once, whoever else tries."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import dead_letter_form as form
from settler_streams.adapters.kafka import dead_letters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import Selection
from settler_streams.adapters.postgres.effects import Effect
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.agents.recorder import effects_of
from settler_streams.core.fold import Record
from settler_streams.errors import FencedError, RecordError, StateError, UnavailableError
from settler_streams.events import ClockTick, JobDecided, QueuePriority
from settler_streams.ids import TenantId
from settler_streams.runtime import projection
from settler_streams.runtime.projection import ProjectionSession, ProjectionSpec
from settler_streams.runtime.reader import InputReader
from settler_streams.runtime.step import Records
from settler_streams.topology import load_topology
from tests.runtime import counter
from tests.runtime.counter import arrived
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog
from tests.runtime.requests import event_bytes, new_id

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Service, Services

pytestmark = pytest.mark.services

PARTITIONS = 16
Open = Callable[[], Awaitable[ProjectionSession]]
_partitions = itertools.count()
tenant_in = functools.partial(counter.tenant_in, partitions=PARTITIONS)
BEYOND_POSTGRES_MS = 2**63 - 1
"""No timestamp of PostgreSQL's reaches that far."""


@pytest.fixture(scope="module")
def settings(services: Services, kafka: Service, deployment: str, database: str) -> Settings:
    """Settings of the module's own deployment and database."""
    name = PurePosixPath(urlsplit(database).path).name
    return services.settings.model_copy(update={"deployment": deployment, "db_name": name})


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """All topics, and a migrated database."""
    log = KafkaLog(settings, load_topology().model_copy(update={"tenant_partitions": PARTITIONS}))
    await migrate(settings)
    await log.create()
    return log


@pytest_asyncio.fixture(scope="module")
async def pool(settings: Settings, log: KafkaLog) -> AsyncIterator[TenantConnectionPool]:
    pool = await TenantConnectionPool.open(settings)
    yield pool
    await pool.close()


@pytest.fixture
def partition() -> int:
    """A partition that no other test has touched."""
    return next(_partitions)


@pytest_asyncio.fixture
async def opened(log: KafkaLog, pool: TenantConnectionPool, partition: int) -> AsyncIterator[Open]:
    """Opens sessions of the recorder for the test's partition."""
    sessions: list[ProjectionSession] = []
    declared = log.topology.projection("recorder")
    spec = ProjectionSpec(declared, log.topology, Cluster.of(log.settings), log.settings.deployment, pool)

    async def open_session() -> ProjectionSession:
        session = ProjectionSession(spec, partition)
        sessions.append(session)
        await session.open()
        return session

    yield open_session
    for session in sessions:
        await session.close()


async def test_rows_and_position_are_written_together_and_a_restart_goes_on_behind_them(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int
) -> None:
    tenants = [tenant_in(partition, number) for number in range(3)]
    first = await opened()
    await decide(log, partition, [(tenant, {}) for tenant in tenants])
    await project(first, await arrived(log, first))
    assert [len(await jobs(pool, tenant)) for tenant in tenants] == [1, 1, 1]

    second = await opened()
    assert second.positions[tp(log, partition)] == 3
    await decide(log, partition, [(tenants[0], {})])
    await project(second, await arrived(log, second))
    assert [len(await jobs(pool, tenant)) for tenant in tenants] == [2, 1, 1]


async def test_a_step_that_raises_writes_neither(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int
) -> None:
    await decide(log, partition, [(tenant_in(partition), {})])
    session = await opened()
    records = await arrived(log, session)

    async def failing() -> None:
        async with session.new_step(records) as step:
            for record in step.decode():
                step.write(step.project(effects_of, record))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()
    assert await jobs(pool, tenant_in(partition)) == []
    assert (await opened()).positions[tp(log, partition)] == 0


async def test_a_second_owner_changes_nothing(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int
) -> None:
    tenant = tenant_in(partition)
    await decide(log, partition, [(tenant, {})])
    slow, fast = await opened(), await opened()
    records = await arrived(log, slow)
    await project(fast, records)
    written = await jobs(pool, tenant)

    with pytest.raises(FencedError):
        await project(slow, records)

    assert await jobs(pool, tenant) == written
    assert (await opened()).positions[tp(log, partition)] == 1


async def test_what_cannot_be_written_is_a_dead_letter_and_the_rest_is_written(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int
) -> None:
    """A row that Postgres refuses, bytes that are no event, an event of another topic, a key that is no text."""
    tenant = tenant_in(partition)
    poison, misplaced = decision({"requested_at_ms": BEYOND_POSTGRES_MS}), ClockTick(role="recorder")
    values = {
        "good": event_bytes(decision({}), tenant),
        "poison": event_bytes(poison, tenant),
        "garbage": b"\xff garbage",
        "nested": b"[" * 100_000,
        "misplaced": event_bytes(misplaced, tenant),
        "empty": None,
        "last": event_bytes(decision({}), tenant),
    }
    offsets = await log.append("job-decisions", partition, [(tenant.encode(), value) for value in values.values()])
    offsets += await log.append("job-decisions", partition, [(b"\xff", event_bytes(decision({}), tenant))])
    session = await opened()

    await project(session, await arrived(log, session))

    assert len(await jobs(pool, tenant)) == 2
    assert session.positions[tp(log, partition)] == offsets[-1] + 1
    letters = [dict(record.headers) for record in await log.read("dead-letters", [partition])]
    reasons = {int(letter[form.OFFSET]): letter[form.REASON].decode() for letter in letters}
    assert len(letters) == len(reasons) == 6
    assert reasons.pop(offsets[1]).startswith("postgres-")
    expected = ["not-json", "not-json", "misplaced", "empty"]
    assert reasons == {**dict(zip(offsets[2:6], expected, strict=True)), offsets[7]: "key"}
    assert {letter[form.ROLE] for letter in letters} == {b"recorder"}


async def test_dead_letters_are_sent_together_and_give_up_before_their_transaction_does(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool.platform() as transaction:
        ends_after_s = await transaction.fetchval(
            "SELECT extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval)"
        )
    assert ends_after_s >= 2 * projection.DEAD_LETTERS_S_MAX
    session = await opened()
    await decide(log, partition, [(tenant_in(partition), {"requested_at_ms": BEYOND_POSTGRES_MS})] * 20)
    records = await arrived(log, session)
    unanswered: list[asyncio.Future[None]] = []

    async def send(*_given: object, **_more: object) -> asyncio.Future[None]:
        unanswered.append(asyncio.get_running_loop().create_future())
        return unanswered[-1]

    with monkeypatch.context() as silent:
        silent.setattr(session.producer, "send", send)
        silent.setattr(projection, "DEAD_LETTERS_S_MAX", 0.5)
        with pytest.raises(UnavailableError, match="dead letters could not be stored"):
            await project(session, records)
    assert len(unanswered) == 20

    await project(session, records)
    letters = await log.read("dead-letters", [partition])
    assert [int(dict(letter.headers)[form.OFFSET]) for letter in letters] == list(range(20))
    assert session.positions[tp(log, partition)] == 20


async def test_what_is_redriven_does_not_replace_what_was_written_since(
    log: KafkaLog, pool: TenantConnectionPool, opened: Open, partition: int
) -> None:
    """However often it is refused and redriven; where nothing newer was written, it is what counts."""
    tenant, overtaken, alone = tenant_in(partition), new_id(), new_id()
    session = await opened()
    await decide(log, partition, [(tenant, {"job_id": job, "admitted": False}) for job in (overtaken, alone)])

    await project(session, await arrived(log, session), refusing)
    await decide(log, partition, [(tenant, {"job_id": overtaken})])
    await project(session, await arrived(log, session))
    await redrive(log, partition, 2)
    await project(session, await arrived(log, session), refusing)
    await redrive(log, partition, 2)
    redriven = await arrived(log, session)
    await project(session, redriven)

    rows = {str(row["job_id"]): (row["decision"], row["decision_version"]) for row in await jobs(pool, tenant)}
    assert rows == {overtaken: ("admitted", 2), alone: ("rejected", 1)}
    assert session.positions[tp(log, partition)] == redriven[tp(log, partition)][-1].offset + 1 > 6


async def test_a_position_outside_of_the_log_stops_the_projection(log: KafkaLog, opened: Open, partition: int) -> None:
    await opened()
    await decide(log, partition, [(tenant_in(partition), {})] * 3)
    async with Cluster.of(log.settings).admin() as client:
        await client.delete_records({tp(log, partition): RecordsToDelete(before_offset=2)})
    with pytest.raises(StateError, match="lies outside the log"):
        await opened()


async def test_a_topic_that_was_made_again_stops_the_projection(log: KafkaLog, opened: Open, partition: int) -> None:
    """It has the same name and other records; the test comes last, because it takes the topic from the others."""
    await opened()
    async with Cluster.of(log.settings).admin() as client:
        await client.delete_topics([log.full("job-decisions")])
        async with asyncio.timeout(WAIT_S_MAX):
            while log.full("job-decisions") in await client.list_topics():
                continue
    await log.create()
    with pytest.raises(StateError, match="re-created"):
        await opened()


async def project(
    session: ProjectionSession, records: Records, effects: Callable[[Record], Sequence[Effect]] = effects_of
) -> None:
    """One step, as the recorder does it."""
    async with session.new_step(records) as step:
        for record in step.decode():
            step.write(step.project(effects, record))


def refusing(_record: Record) -> Sequence[Effect]:
    """As a recorder that does not know the event yet."""
    raise RecordError("unknown-type", "not yet")


async def redrive(log: KafkaLog, partition: int, expected: int) -> None:
    chosen = Selection(tenant=tenant_in(partition))
    redriven = await dead_letters.redrive(log.settings, log.topology, chosen, limit=10, rate_per_s=100)
    assert len(redriven.sent) == expected
    await log.read("job-decisions", [partition])  # a commit is answered a moment before what it covers can be read


async def decide(log: KafkaLog, partition: int, decisions: list[tuple[TenantId, dict[str, Any]]]) -> None:
    events = [(tenant.encode(), event_bytes(decision(fields), tenant)) for tenant, fields in decisions]
    await log.append("job-decisions", partition, events)


def decision(fields: dict[str, Any]) -> JobDecided:
    common: dict[str, Any] = {"kind": "reconciliation", "priority": QueuePriority.NORMAL, "decided_at_ms": 2}
    return JobDecided(**{"job_id": new_id(), "admitted": True, "requested_at_ms": 1, **common, **fields})


async def jobs(pool: TenantConnectionPool, tenant: TenantId) -> list[Any]:
    async with pool.tenant(tenant) as transaction:
        return list(await transaction.fetch("SELECT * FROM jobs ORDER BY job_id"))


def tp(log: KafkaLog, partition: int) -> TopicPartition:
    return TopicPartition(log.full("job-decisions"), partition)


async def test_a_broker_that_says_for_a_moment_that_less_is_committed_is_asked_again(
    log: KafkaLog, opened: Open, partition: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await opened()
    await decide(log, partition, [(tenant_in(partition), {})] * 3)
    await project(session, await arrived(log, session))
    asked, understated_times = 0, 2

    async def understating(self: InputReader) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        nonlocal asked
        asked += 1
        beginnings, ends = await bounds(self)
        return beginnings, dict.fromkeys(ends, 0) if asked <= understated_times else ends

    bounds = InputReader.bounds
    monkeypatch.setattr(InputReader, "bounds", understating)
    assert (await opened()).positions == session.positions
    assert asked == 3
    understated_times = 1_000_000
    monkeypatch.setattr(projection, "ENDS_SETTLE_S", 0.3)
    with pytest.raises(StateError, match="lies outside the log"):
        await opened()
