"""Who may open a fold: a present member, of all its inputs together, over topics that are as declared."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest
import pytest_asyncio
from aiokafka.admin import NewTopic
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import GroupAuthorizationFailedError, KafkaConnectionError
from aiokafka.protocol.group import LeaveGroupRequest
from faust.types import TP

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.runtime.app import FoldApp
from settler_streams.runtime.session import Session
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.apps import running
from tests.runtime.counter import PARTITIONS, tenant_in, usage
from tests.runtime.kafka_log import WAIT_S_MAX, KafkaLog
from tests.runtime.members import Worker, last_folded, shared

pytestmark = pytest.mark.services

FOLDS = set(range(PARTITIONS))


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


async def test_kafka_says_who_owns_a_fold(log: KafkaLog) -> None:
    first, second = Worker(log), Worker(log)
    async with running([first.app, second.app]):
        ours, theirs = await shared(first, second)
        assert (ours | theirs, ours & theirs) == (FOLDS, set())
        assert {fold for fold in FOLDS if await first.app.consumer.is_assigned(fold)} == ours
        assert {fold for fold in FOLDS if await second.app.consumer.is_assigned(fold)} == theirs


async def test_a_member_that_the_group_has_lost_does_not_open_what_it_believes_to_own(log: KafkaLog) -> None:
    """It was frozen for longer than the session timeout and has just woken up: nobody has told it yet."""
    worker = Worker(log)
    async with running([worker.app]):
        await worker.owns(lambda n: n == PARTITIONS)

        async def excluded_and_asked(consumer: Any) -> bool:
            coordinator = consumer._coordinator
            await coordinator._send_req(LeaveGroupRequest(coordinator.group_id, coordinator.member_id))
            return bool(await worker.app.consumer._is_assigned(consumer, 0))

        assert not await worker.app.consumer._thread.in_thread(excluded_and_asked)
        await worker.owns(lambda n: n == PARTITIONS)  # it has joined again


async def test_a_member_that_cannot_join_ends_its_worker(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be without folds and well otherwise, as a spare one is; nobody would notice."""

    async def refused(*_given: object) -> None:
        raise GroupAuthorizationFailedError("planted")

    monkeypatch.setattr(GroupCoordinator, "_do_rejoin_group", refused)
    worker = Worker(log)
    with pytest.raises(AssertionError, match="an app failed") as failed:
        async with running([worker.app]), asyncio.timeout(WAIT_S_MAX):
            await asyncio.wait([worker.app.failure])
    assert isinstance(failed.value.__cause__, GroupAuthorizationFailedError)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # the consumer's thread says so, too
async def test_a_kafka_that_goes_away_during_the_start_is_unavailable(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered when the app looked at its topics, and not when the group's consumer connected."""

    async def refused(*_given: object) -> None:
        raise KafkaConnectionError("planted")

    worker = Worker(log)
    create = worker.app.consumer._thread._create_worker_consumer

    def unreachable(transport: Any) -> Any:
        consumer = create(transport)
        monkeypatch.setattr(consumer, "start", refused)
        return consumer

    monkeypatch.setattr(worker.app.consumer._thread, "_create_worker_consumer", unreachable)
    with pytest.raises(UnavailableError, match=r"did not answer: KafkaConnectionError\(.*planted"):
        async with running([worker.app]):
            raise await worker.app.failure
    assert isinstance(worker.app.failure.result(), UnavailableError)


async def test_work_that_ends_with_the_consumers_thread_is_no_cancellation_of_whoever_waits(log: KafkaLog) -> None:
    worker = Worker(log)
    async with running([worker.app]):
        await worker.owns(lambda n: n == PARTITIONS)
        in_thread = worker.app.consumer._thread.in_thread

        async def ended_with_it(_consumer: Any) -> None:
            raise asyncio.CancelledError

        async def never(_consumer: Any) -> None:
            begun.set_result(None)
            await asyncio.Event().wait()

        with pytest.raises(UnavailableError, match="thread has ended"):
            await in_thread(ended_with_it)
        begun: concurrent.futures.Future[None] = concurrent.futures.Future()
        waiting = asyncio.create_task(in_thread(never))
        await asyncio.wrap_future(begun)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_session_that_has_not_taken_its_fold_when_a_rebalance_comes_does_not_take_it_afterwards(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker hangs on its way to the producer of every fold; half of them get another owner meanwhile."""
    slow, fast = Worker(log), Worker(log)
    go_on = asyncio.Event()
    open_producer = Session._open_producer

    async def slowly(session: Session) -> None:
        if any(session in sessions for sessions in slow.sessions.values()):
            await go_on.wait()
        await open_producer(session)

    monkeypatch.setattr(Session, "_open_producer", slowly)
    async with running([slow.app]):
        async with asyncio.timeout(WAIT_S_MAX):
            while slow.sessions.keys() != FOLDS:
                await asyncio.wait([slow.app.failure], timeout=0.05)
        async with running([fast.app]):
            theirs = await fast.owns(lambda n: n == PARTITIONS // 2)
            go_on.set()
            ours = await slow.owns(lambda n: n == PARTITIONS // 2)
            assert ours == FOLDS - theirs
            offsets = {p: (await log.append("usage-events", p, [usage(tenant_in(p))]))[0] for p in FOLDS}
            await log.until("counter-journal", lambda r: all(last_folded(r, p) >= at for p, at in offsets.items()))
            assert [session.lost for fold in theirs for session in fast.sessions[fold]] == [False] * len(theirs)
            assert {len(slow.sessions[fold]) for fold in theirs} == {1}
            assert {len(slow.sessions[fold]) for fold in ours} == {2}, "all were given up before the group went on"


async def test_a_fold_that_is_dropped_as_its_load_ends_is_given_back(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's close takes the cancellation for that of its own task, and the session opens to its end."""
    worker = Worker(log)
    consumer, close, close_session = worker.app.consumer, Fetcher.close, Session.close
    dropped: asyncio.Future[tuple[Session, asyncio.Task[None]]] = asyncio.get_running_loop().create_future()
    closed: list[Session] = []

    async def at_the_same_time(fetcher: Fetcher) -> None:
        for partition, (*_, session) in worker.sessions.items():
            if not dropped.done() and session._loader is not None and session._loader._fetcher is fetcher:
                dropped.set_result((session, asyncio.create_task(consumer._drop(partition))))
        await close(fetcher)

    async def counted(session: Session) -> None:
        closed.append(session)
        await close_session(session)

    monkeypatch.setattr(Fetcher, "close", at_the_same_time)
    monkeypatch.setattr(Session, "close", counted)
    async with running([worker.app]):
        async with asyncio.timeout(WAIT_S_MAX):
            session, dropping = await dropped
            await dropping
        assert hasattr(session, "logic"), "the cancellation was swallowed"
        assert (closed.count(session), session.lost) == (1, True)
        assert session.id.partition not in await worker.owns(lambda n: n == PARTITIONS - 1)


async def test_the_inputs_of_a_fold_are_assigned_together_or_the_worker_stops(log: KafkaLog) -> None:
    """Faust's own choice for an app without tables would be round robin, which splits them."""
    app = FoldApp(
        "counter",
        f"{log.settings.deployment}.counter",
        cluster=Cluster.of(log.settings),
        input_topics=("a", "b"),
        partitions=2,
        new_session=lambda _partition: pytest.fail("no session may be opened"),
    )
    assert app.consumer._thread._create_worker_consumer(None)._partition_assignment_strategy == [app.assignor]
    assert app.consumer._partitions_of([TP("a", 0), TP("b", 0)]) == {0}
    with pytest.raises(ConfigurationError, match="partition 1 was assigned without"):
        await app.consumer.assign_folds([TP("a", 0), TP("b", 0), TP("a", 1)])


@pytest.mark.parametrize("missing", ["usage-events", "counter-changelog", "counter-journal"])
async def test_a_missing_topic_stops_the_start(log: KafkaLog, settings: Settings, missing: str) -> None:
    deployment = f"{settings.deployment[:24]}-{missing[-9:]}"
    other = KafkaLog(settings.model_copy(update={"deployment": deployment}), log.topology)
    await other.create(without=[missing])
    await refuses_to_start(other, missing)


async def test_an_input_with_another_partition_count_stops_the_start(log: KafkaLog, settings: Settings) -> None:
    other = KafkaLog(settings.model_copy(update={"deployment": f"{settings.deployment[:30]}-count"}), log.topology)
    await other.create(without=["usage-events"])
    async with Cluster.of(settings).admin() as client:
        topic = NewTopic(other.full("usage-events"), num_partitions=counter.PARTITIONS - 1, replication_factor=1)
        await client.create_topics([topic])
    await refuses_to_start(other, "usage-events")


async def refuses_to_start(log: KafkaLog, named: str) -> None:
    worker = Worker(log)
    starting = asyncio.create_task(worker.app.start())
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            await asyncio.wait([starting, worker.app.failure], return_when=asyncio.FIRST_COMPLETED)
            if worker.app.failure.done():
                error: BaseException | None = worker.app.failure.result()
            else:
                await asyncio.wait([starting])
                error = starting.exception()
        assert isinstance(error, ConfigurationError)
        assert named in str(error)
    finally:
        starting.cancel()
        await asyncio.wait([starting])
        async with asyncio.timeout(30):
            await worker.app.stop()
