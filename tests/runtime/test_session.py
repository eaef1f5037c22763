"""A session: takes a fold over, fences the former owner, and knows exactly what that owner had committed."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.errors import KafkaError, PolicyViolationError, UnknownError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.core.fold import FoldClock, FoldLogic, State
from settler_streams.errors import ConfigurationError, FencedError, StateError, UnavailableError
from settler_streams.runtime import step as step_module
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import Session
from settler_streams.runtime.state import StateCodec
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.counter import FORGET, Counter, Sum, arrived, fold, spec_of, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog
from tests.services.interface import Service

pytestmark = pytest.mark.services

Open = Callable[[int], Awaitable[Session]]

_partitions = itertools.count()


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """Topics with many partitions: each test has a fold of its own."""
    topology = counter.TOPOLOGY.model_copy(update={"tenant_partitions": 32})
    log = KafkaLog(settings, topology)
    await log.create()
    return log


@pytest.fixture
def partition() -> int:
    """A fold that no other test has touched."""
    return next(_partitions)


@pytest_asyncio.fixture
async def opened(log: KafkaLog) -> AsyncIterator[Open]:
    """Opens sessions of the counter, and closes them after the test."""
    sessions: list[Session] = []
    topology = log.topology
    spec = dataclasses.replace(spec_of(log), topology=topology, router=type(spec_of(log).router)(topology))

    async def open_session(partition: int) -> Session:
        session = Session(spec, partition)
        sessions.append(session)
        await session.open()
        return session

    yield open_session
    for session in sessions:
        await session.close()


def local(partition: int, number: int = 0) -> counter.TenantId:
    return tenant_in(partition, number, 32)


async def test_a_new_owner_fences_the_former_one(log: KafkaLog, opened: Open, partition: int) -> None:
    await log.append("usage-events", partition, [usage(local(partition), 5)])
    former = await opened(partition)
    await fold(former, await arrived(log, former))
    await log.append("usage-events", partition, [usage(local(partition), 7)])
    pending = await arrived(log, former)
    owner = await opened(partition)
    before = await _everything(log, partition)

    with pytest.raises(FencedError):
        await fold(former, pending)

    assert former.lost
    assert await _everything(log, partition) == before
    await fold(owner, await arrived(log, owner))
    assert dict(owner.state)[f"sum/{local(partition)}"] == Sum(12, 2)


async def test_what_a_zombie_had_sent_is_never_seen(log: KafkaLog, opened: Open, partition: int) -> None:
    """The former owner has sent everything and is about to commit when it is fenced."""
    await log.append("usage-events", partition, [usage(local(partition), 5)])
    zombie = await opened(partition)
    pending = await arrived(log, zombie)
    sent, fenced = asyncio.Event(), asyncio.Event()
    commit = zombie.commit

    async def commit_after_the_takeover() -> None:
        sent.set()
        await fenced.wait()
        await commit()

    zombie.commit = commit_after_the_takeover  # type: ignore[method-assign]
    step = asyncio.create_task(fold(zombie, pending))
    await asyncio.wait_for(sent.wait(), 20)
    owner = await opened(partition)
    fenced.set()
    with pytest.raises(FencedError):
        await step

    assert await log.read("sums", [partition]) == []
    assert len(await log.read("sums", [partition], isolation="read_uncommitted")) == 1
    assert await log.committed_offsets("counter", "usage-events", partition) is None
    assert dict(owner.state) == {}
    await fold(owner, await arrived(log, owner))
    assert len(await log.read("sums", [partition])) == 1


async def test_fencing_is_told_from_other_failures_whenever_it_is_noticed(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    """The first send is refused before the second is handed over: the client then says only that it cannot send."""
    await log.append("usage-events", partition, [usage(local(partition))])
    former = await opened(partition)
    pending = await arrived(log, former)
    await opened(partition)
    send_batch = former.producer.send_batch

    async def one_by_one(*args: object, **kwargs: object) -> object:
        sent = await send_batch(*args, **kwargs)
        await asyncio.wait([sent], timeout=20)
        return sent

    former.producer.send_batch = one_by_one
    with pytest.raises(FencedError):
        await fold(former, pending)


async def test_an_opening_that_a_newer_owner_overtakes_is_fenced(log: KafkaLog, opened: Open, partition: int) -> None:
    """It has read the state from before and reads the offsets from after: that is no damaged log."""
    await log.append("usage-events", partition, [usage(local(partition))])
    spec = dataclasses.replace(spec_of(log), topology=log.topology, router=Router(log.topology))
    overtaken = Session(spec, partition)
    check_topics = overtaken._check_topics

    async def overtake(client: AIOKafkaAdminClient, stored: Mapping[str, str]) -> None:
        owner = await opened(partition)
        await fold(owner, await arrived(log, owner))
        await check_topics(client, stored)

    overtaken._check_topics = overtake  # type: ignore[method-assign]
    with pytest.raises(FencedError, match="while this one was opening"):
        await overtaken.open()
    assert overtaken.lost


@pytest.mark.parametrize(
    ("overtaken", "raised", "error", "said"),
    [
        (True, KeyError("other"), FencedError, "while this one was opening"),
        (False, KeyError("other"), StateError, "contradicts itself: KeyError"),
        (False, ConfigurationError("no tiers"), ConfigurationError, "no tiers"),
    ],
    ids=["overtaken", "damaged", "configuration"],
)
async def test_a_state_that_no_logic_fits_is_damaged_unless_a_newer_owner_has_changed_it(
    log: KafkaLog,
    opened: Open,
    partition: int,
    overtaken: bool,
    raised: Exception,
    error: type[Exception],
    said: str,
) -> None:
    """Compaction under the newer owner leaves an older reader of the changelog a part of the old and one of the new."""

    def torn(_state: State, _partition: int) -> FoldLogic:
        raise raised

    topology = log.topology
    spec = dataclasses.replace(spec_of(log), topology=topology, router=Router(topology), new_logic=torn)
    session = Session(spec, partition)
    load = session._load

    async def loaded() -> None:
        await load()
        if overtaken:
            await opened(partition)

    session._load = loaded  # type: ignore[method-assign]
    with pytest.raises(error, match=said):
        await session.open()
    assert session.lost


async def test_a_broker_that_hangs_in_the_commit_loses_the_session_and_no_record(
    log: KafkaLog, opened: Open, partition: int, kafka: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether the commit arrived; the next session reads what was decided, and goes on from there."""
    await log.append("usage-events", partition, [usage(local(partition))])
    first = await opened(partition)
    pending = await arrived(log, first)
    commit = first.commit

    async def commit_into_silence() -> None:
        kafka.pause()
        await commit()

    first.commit = commit_into_silence  # type: ignore[method-assign]
    with monkeypatch.context() as patched:
        patched.setattr(step_module, "STEP_DEADLINE_S", 0.5)
        try:
            with pytest.raises(UnavailableError, match="no answer"):
                await fold(first, pending)
        finally:
            kafka.resume()
    assert first.lost

    second = await opened(partition)
    if remaining := await arrived(log, second):
        await fold(second, remaining)
    assert second.state[f"sum/{local(partition)}"] == Sum(1, 1)
    assert len(await log.read("sums", [partition])) == 1
    await log.until_committed("counter", "usage-events", partition, 1)


async def test_the_state_is_what_the_former_owner_had_committed(log: KafkaLog, opened: Open, partition: int) -> None:
    tenants = [local(partition, number) for number in range(20)]
    first = await opened(partition)
    for _ in range(3):
        await log.append("usage-events", partition, [usage(tenant, 2) for tenant in tenants])
        await fold(first, await arrived(log, first))
    await log.append("usage-events", partition, [usage(tenant, FORGET) for tenant in tenants[::2]])
    await fold(first, await arrived(log, first))

    second = await opened(partition)

    assert dict(second.state) == dict(first.state)
    assert len(second.state) == 1 + len(tenants) // 2  # the clock, and the sums that were not deleted
    assert second.positions == first.positions
    assert second.now_ms == first.now_ms > 0


async def test_a_fold_that_has_never_run_starts_at_the_beginning_of_its_inputs(opened: Open, partition: int) -> None:
    session = await opened(partition)
    assert dict(session.state) == {}
    assert list(session.positions.values()) == [0]
    assert session.now_ms == 0


async def test_a_changelog_of_tombstones_loads_as_no_state(log: KafkaLog, opened: Open, partition: int) -> None:
    keys = [f"sum/{local(partition, number)}".encode() for number in range(5)]
    await log.append("counter-changelog", partition, [(key, None) for key in keys])
    assert dict((await opened(partition)).state) == {}


async def test_a_changelog_whose_records_are_all_gone_loads_as_no_state(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    """Its offsets go on where they were: it begins and ends at one that is not zero."""
    topic = log.full("counter-changelog")
    offsets = await log.append("counter-changelog", partition, [(b"sum/1", None)] * 3)
    async with Cluster.of(log.settings).admin() as client:
        await _set_config(client, topic, {"cleanup.policy": "delete"})
        gone = {TopicPartition(topic, partition): RecordsToDelete(before_offset=offsets[-1] + 1)}
        await _once_in_force(lambda: client.delete_records(gone), PolicyViolationError)
        await _set_config(client, topic, {"cleanup.policy": "compact"})
    session = await opened(partition)
    assert dict(session.state) == {}


@pytest.mark.slow
async def test_a_changelog_that_was_compacted_to_tombstones_loads_as_no_state(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    """The values that they deleted are gone: the broker's cleaner has been there, and has left holes."""
    topic = log.full("counter-changelog")
    value = StateCodec(Counter.kinds).encode(Sum(1, 1))
    async with Cluster.of(log.settings).admin() as client:
        await _set_config(
            client,
            topic,
            {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.001"},
        )
    keys = [f"sum/{number}".encode() for number in range(50)]
    await log.append("counter-changelog", partition, [(key, value) for key in keys])
    await log.append("counter-changelog", partition, [(key, None) for key in keys])
    left = await log.read("counter-changelog", [partition])
    async with asyncio.timeout(200):
        while any(record.value for record in left):
            # Each further record closes a segment, which is what the cleaner looks at.
            await log.append("counter-changelog", partition, [(b"sum/last", None)])
            left = await log.read("counter-changelog", [partition])
    assert {record.key for record in left} >= set(keys), "the tombstones are still there"
    session = await opened(partition)
    assert dict(session.state) == {}


async def test_a_changelog_that_ends_in_transaction_markers_comes_to_its_end(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    """A committed record, then an aborted one with its marker: the last offsets are not records that anyone sees."""
    codec = StateCodec(Counter.kinds)
    topic = log.full("counter-changelog")
    async with log.producer(transactional_id=f"{log.settings.deployment}.changelog-writer") as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, codec.encode(Sum(4, 1)), key=b"sum/kept", partition=partition)
        await producer.commit_transaction()
        await producer.begin_transaction()
        await producer.send_and_wait(topic, codec.encode(Sum(9, 9)), key=b"sum/aborted", partition=partition)
        await producer.abort_transaction()
    assert dict((await opened(partition)).state) == {"sum/kept": Sum(4, 1)}


async def test_a_large_state_loads_whole(
    log: KafkaLog, opened: Open, partition: int, record_property: Callable[[str, object], None]
) -> None:
    keys = 120_000
    codec = StateCodec(Counter.kinds)
    topic = log.full("counter-changelog")
    async with log.producer(max_batch_size=512 * 1024) as producer:
        batch, sent = producer.create_batch(), []
        for number in range(keys):
            record = {"key": f"sum/{number:032}".encode(), "value": codec.encode(Sum(number, 1))}
            if batch.append(**record, timestamp=None) is None:
                sent.append(await producer.send_batch(batch, topic, partition=partition))
                batch = producer.create_batch()
                batch.append(**record, timestamp=None)
        sent.append(await producer.send_batch(batch, topic, partition=partition))
        await asyncio.gather(*sent)

    started = time.perf_counter()
    session = await opened(partition)
    took_s = time.perf_counter() - started

    assert len(session.state) == keys
    assert session.state[f"sum/{keys - 1:032}"] == Sum(keys - 1, 1)
    record_property("recovered_keys_per_s", round(keys / took_s))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"nonsense/1", b"\x01\x92\x01\x01"),
        (b"sum/1", b"\x07\x92\x01\x01"),
        (b"sum/1", b"\x01\x91\xa1x"),
        (b"sum/1", b""),
        (b"sum/\xff", b"\x01\x92\x01\x01"),
        (None, b"\x01\x92\x01\x01"),
    ],
    ids=["unknown-kind", "unknown-format", "other-fields", "no-bytes", "key-not-utf8", "no-key"],
)
async def test_a_changelog_record_that_cannot_be_read_stops_the_fold(
    log: KafkaLog, opened: Open, partition: int, key: bytes | None, value: bytes
) -> None:
    topic = "counter-changelog"
    if key is None:
        # A compacted topic refuses a record without a key; one may still lie there from before it was compacted.
        async with Cluster.of(log.settings).admin() as client:
            await _set_config(client, log.full(topic), {"cleanup.policy": "delete"})
            await _once_in_force(lambda: log.append(topic, partition, [(key, value)]), UnknownError)
            await _set_config(client, log.full(topic), {"cleanup.policy": "compact"})
    else:
        await log.append(topic, partition, [(key, value)])
    with pytest.raises(StateError, match="changelog"):
        await opened(partition)


async def test_a_committed_offset_that_the_state_does_not_know_stops_the_fold(
    log: KafkaLog, opened: Open, partition: int
) -> None:
    await _commit(log, partition, 5)
    with pytest.raises(StateError, match="committed together"):
        await opened(partition)


async def test_records_deleted_before_they_were_read_stop_the_fold(log: KafkaLog, opened: Open, partition: int) -> None:
    await log.append("usage-events", partition, [usage(local(partition))])
    former = await opened(partition)
    await fold(former, await arrived(log, former))
    await log.append("usage-events", partition, [usage(local(partition)) for _ in range(3)])
    async with Cluster.of(log.settings).admin() as client:
        tp = TopicPartition(log.full("usage-events"), partition)
        await client.delete_records({tp: RecordsToDelete(before_offset=3)})
    with pytest.raises(StateError, match="lies outside the log"):
        await opened(partition)


async def test_the_clock_never_goes_back_not_even_across_a_restart(log: KafkaLog, opened: Open, partition: int) -> None:
    """The broker's clock was an hour ahead when the first record came; it has been set right since."""
    first = await opened(partition)
    await log.append("usage-events", partition, [usage(local(partition))])
    ((tp, raws),) = (await arrived(log, first)).items()
    ahead_ms = raws[0].timestamp + 3_600_000
    await fold(first, {tp: [dataclasses.replace(raws[0], timestamp=ahead_ms)]})
    assert first.now_ms == ahead_ms
    await first.close()

    second = await opened(partition)
    assert second.now_ms == ahead_ms
    await log.append("usage-events", partition, [usage(local(partition))])
    await fold(second, await arrived(log, second))

    assert second.now_ms == ahead_ms
    assert second.state["clock/"] == FoldClock(ahead_ms, {"usage-events": 2}, second.topic_ids)
    assert [event.time_ms for event in await log.events("sums", [partition])] == [ahead_ms, ahead_ms]


async def _everything(log: KafkaLog, partition: int) -> object:
    topics = ("sums", "counter-changelog", "counter-journal", "dead-letters")
    records = [[(r.offset, r.value) for r in await log.read(topic, [partition])] for topic in topics]
    return records, await log.committed_offsets("counter", "usage-events", partition)


async def _commit(log: KafkaLog, partition: int, offset: int) -> None:
    async with log.consumer(group_id=f"{log.settings.deployment}.counter") as consumer:
        tp = TopicPartition(log.full("usage-events"), partition)
        consumer.assign([tp])
        await consumer.commit({tp: OffsetAndMetadata(offset, "")})


async def _set_config(client: object, topic: str, configs: dict[str, str]) -> None:
    from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

    resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs=configs)
    await client.alter_configs([resource])  # type: ignore[attr-defined]


async def _once_in_force(work: Callable[[], Awaitable[object]], refused: type[KafkaError]) -> None:
    """Do what a new configuration allows. The controller's answer comes a moment before the broker goes by it."""
    async with asyncio.timeout(WAIT_S_MAX):
        while True:
            try:
                await work()
            except refused:
                continue
            return
