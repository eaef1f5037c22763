"""Dead letters on a real broker: bounded listing, redrive to the origin, markers, quarantine, fencing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import aiokafka
import pytest
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import broker, dead_letter_form, dead_letter_removal, dead_letters, tenant_records
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import LIST_MAX, Selection
from settler_streams.adapters.kafka.tenant_records import TenantRecords
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, RecordError, UnavailableError
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology

if TYPE_CHECKING:
    from tests.services.interface import Services

pytestmark = pytest.mark.services

TOPOLOGY = load_topology()
TENANT = "0190a1b2-0000-7000-8000-0000000000a1"
OTHER = "0190a1b2-0000-7000-8000-0000000000b2"
OFFSETS = itertools.count(41)
"""Where each record lay that is refused here."""


@pytest.fixture(scope="module")
async def settings(services: Services, kafka: object, deployment: str) -> Settings:
    made = services.settings.model_copy(update={"deployment": deployment})
    async with Cluster.of(made).admin() as client:
        await broker.apply(client, TOPOLOGY.declared(deployment))
    return made


@contextlib.asynccontextmanager
async def producing(settings: Settings) -> AsyncIterator[aiokafka.AIOKafkaProducer]:
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers) as producer:
        yield producer


class Raw:
    """The record that was refused, as a step sees it."""

    def __init__(
        self, topic: str, partition: int, offset: int, attempts: bytes | None = None, key: bytes | None = None,
        value: bytes = b"",
    ) -> None:  # fmt: skip
        self.topic, self.partition, self.offset, self.key, self.value = topic, partition, offset, key, value
        self.headers: tuple[tuple[str, bytes], ...] = (("traceparent", b"00-ab-cd-01"),)
        if attempts is not None:
            self.headers += ((dead_letter_form.ATTEMPTS, attempts),)


async def refuse(
    settings: Settings, value: bytes, *, reason: str = "schema", tenant: str = TENANT, partition: int = 3,
    attempts: bytes | None = None, at_ms: int = 1_000, topic: str = "job-requests",
) -> str:  # fmt: skip
    raw: Any = Raw(full_name(settings.deployment, topic), partition, next(OFFSETS), attempts, tenant.encode(), value)
    letter = dead_letter_form.letter(raw, "admission", RecordError(reason, "why"), at_ms)
    async with producing(settings) as producer:
        stored = await producer.send_and_wait(
            full_name(settings.deployment, "dead-letters"), letter.value, key=letter.key, partition=partition,
            headers=letter.headers,
        )  # fmt: skip
    return f"{stored.partition}-{stored.offset}"


async def at_origin(settings: Settings, topic: str = "job-requests", partition: int = 3) -> list[Any]:
    """Every committed record of one partition of the origin, waiting for transactions that are being completed."""
    tp = TopicPartition(full_name(settings.deployment, topic), partition)
    async with aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, enable_auto_commit=False
    ) as consumer:
        end = (await consumer.end_offsets([tp]))[tp]
    async with aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, isolation_level="read_committed", enable_auto_commit=False
    ) as consumer:
        consumer.assign([tp])
        await consumer.seek_to_beginning(tp)
        found: list[Any] = []
        while await consumer.position(tp) < end:
            found += (await consumer.getmany(tp, timeout_ms=200)).get(tp, [])
        return found


async def redrive(settings: Settings, selection: Selection, **options: Any) -> dead_letters.Redriven:
    arguments = {"limit": 100, "rate_per_s": 1_000, **options}
    return await dead_letters.redrive(settings, TOPOLOGY, selection, **arguments)


async def test_a_dead_letter_keeps_its_bytes_and_says_where_it_came_from(settings: Settings) -> None:
    made = await refuse(settings, b"\xff\x00 not json", reason="not-json", at_ms=5_000)
    letter = await dead_letters.find(settings, TOPOLOGY, made)
    assert letter.value == b"\xff\x00 not json"
    assert (letter.reason, letter.detail, letter.role) == ("not-json", "why", "admission")
    assert letter.topic == full_name(settings.deployment, "job-requests")
    assert (letter.origin_partition, letter.key) == (3, TENANT.encode())
    assert letter.place.decode() == f"admission/{letter.topic}/3/{letter.origin_offset}/5000"
    assert (letter.attempts, letter.at_ms, letter.tenant) == (1, 5_000, TENANT)
    assert letter.headers["traceparent"] == b"00-ab-cd-01"
    assert not letter.redriven


async def test_selections_and_limits(settings: Settings) -> None:
    await refuse(settings, b"a", reason="oversize", tenant=OTHER, partition=1, at_ms=9_000_000)
    await refuse(settings, b"b", reason="oversize", tenant=OTHER, partition=2, at_ms=9_000_001, topic="usage-events")

    async def values(limit: int = 100, **conditions: Any) -> list[bytes]:
        return [one.value for one in await dead_letters.select(settings, TOPOLOGY, Selection(**conditions), limit)]

    assert await values(tenant=OTHER) == [b"a", b"b"]
    assert await values(tenant=OTHER, limit=1) == [b"a"]
    assert await values(tenant=OTHER, topic="usage-events") == [b"b"]
    assert await values(reason="oversize", since_ms=9_000_001) == [b"b"]
    assert await values(reason="never") == []
    with pytest.raises(InvalidRequestError, match="between 1 and"):
        await values(limit=LIST_MAX + 1)


async def test_a_redrive_brings_the_bytes_back_once(settings: Settings) -> None:
    made = await refuse(settings, b"again", attempts=b"1")
    assert (await redrive(settings, Selection(ids=frozenset({made})))).sent == [made]
    (record,) = [record for record in await at_origin(settings) if record.value == b"again"]
    assert record.key == TENANT.encode()
    lay_at = (await dead_letters.find(settings, TOPOLOGY, made)).origin_offset
    assert dict(record.headers) == {
        "traceparent": b"00-ab-cd-01",
        dead_letter_form.ATTEMPTS: b"2",
        dead_letter_form.REDRIVEN_OFFSET: str(lay_at).encode(),
    }
    second = await redrive(settings, Selection(ids=frozenset({made})))
    assert (second.sent, second.already) == ([], [made])
    assert (await dead_letters.find(settings, TOPOLOGY, made)).redriven
    assert len([record for record in await at_origin(settings) if record.value == b"again"]) == 1
    forced = await redrive(settings, Selection(ids=frozenset({made})), force=True)
    assert forced.sent == [made]
    assert len([record for record in await at_origin(settings) if record.value == b"again"]) == 2


async def test_what_failed_too_often_is_quarantined(settings: Settings) -> None:
    made = await refuse(settings, b"hopeless", attempts=b"4")
    assert (await dead_letters.find(settings, TOPOLOGY, made)).quarantined
    assert (await redrive(settings, Selection(ids=frozenset({made})))).quarantined == [made]
    assert not [record for record in await at_origin(settings) if record.value == b"hopeless"]
    assert (await redrive(settings, Selection(ids=frozenset({made})), force=True)).sent == [made]


async def test_a_bulk_redrive_goes_on_behind_what_it_has_sent(settings: Settings) -> None:
    made = [await refuse(settings, b"bulk", reason="bulk") for _ in range(3)]
    await refuse(settings, b"bulk", reason="bulk", attempts=b"9")
    sent: list[int] = []
    first = await redrive(settings, Selection(reason="bulk"), limit=2, on_sent=sent.append)
    second = await redrive(settings, Selection(reason="bulk"), limit=2)
    third = await redrive(settings, Selection(reason="bulk"), limit=2)
    assert [first.sent, second.sent, third.sent] == [made[:2], made[2:], []]
    assert sum(sent) == 2


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As partitions without a leader: they have ends and give nothing."""
    assign = aiokafka.AIOKafkaConsumer.assign

    def assign_paused(consumer: aiokafka.AIOKafkaConsumer, tps: list[TopicPartition]) -> None:
        assign(consumer, tps)
        consumer.pause(*tps)

    monkeypatch.setattr(aiokafka.AIOKafkaConsumer, "assign", assign_paused)
    monkeypatch.setattr(aiokafka.AIOKafkaConsumer, "resume", lambda *_given: None)


def without_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the client when nobody says where a partition begins."""

    async def position(*_given: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(aiokafka.AIOKafkaConsumer, "position", position)


@pytest.mark.parametrize("make", [silent, without_position])
async def test_records_that_do_not_come_end_the_reading(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, make: Callable[[pytest.MonkeyPatch], None]
) -> None:
    await refuse(settings, b"unreachable")
    make(monkeypatch)
    monkeypatch.setattr(dead_letters, "READ_DEADLINE_S", 1.0)
    async with asyncio.timeout(30):
        with pytest.raises(UnavailableError, match=r"reading the dead letters: .*TimeoutError"):
            await everything(settings)
    monkeypatch.setattr(tenant_records, "CALL_S_MAX", 3.0)  # which is also how long it may take to connect
    async with (
        asyncio.timeout(30),
        TenantRecords(settings, TOPOLOGY, TenantId(TENANT), TenantId(TENANT)).opened() as own,
    ):
        with pytest.raises(UnavailableError, match="TimeoutError"):
            _ = [record async for record in own.read("dead-letters")]


@pytest.mark.parametrize("topic", ["dead-letters", "unheard-of"])
async def test_only_topics_of_the_deployment_are_written_to(settings: Settings, topic: str) -> None:
    made = await refuse(settings, b"stray", topic=topic)
    with pytest.raises(InvalidRequestError, match="no topic of this deployment"):
        await redrive(settings, Selection(ids=frozenset({made})))


@pytest.mark.parametrize("answered", [False, True], ids=["records-on-their-way", "refused-before-the-marker-is-sent"])
async def test_a_later_redrive_takes_over(settings: Settings, monkeypatch: pytest.MonkeyPatch, answered: bool) -> None:
    value = b"contested, answered" if answered else b"contested"
    made = await refuse(settings, value)
    selection = Selection(ids=frozenset({made}))
    select, sending = dead_letters.select, aiokafka.AIOKafkaProducer.send

    async def send(producer: aiokafka.AIOKafkaProducer, *arguments: Any, **more: Any) -> Any:
        answer = await sending(producer, *arguments, **more)
        await asyncio.wait([answer])  # so the producer knows before the next one that it was fenced
        return answer

    async def overtaken(*arguments: Any) -> Any:
        chosen = await select(*arguments)
        monkeypatch.undo()
        assert (await redrive(settings, selection)).sent == [made]
        if answered:
            monkeypatch.setattr(aiokafka.AIOKafkaProducer, "send", send)
        return chosen

    monkeypatch.setattr(dead_letters, "select", overtaken)
    with pytest.raises(ConflictError, match="another redrive has taken over"):
        await redrive(settings, selection)
    assert len([record for record in await at_origin(settings) if record.value == value]) == 1


@pytest.mark.parametrize(("letter_id", "error"), [("3-999999", NotFoundError), ("three", InvalidRequestError)])
async def test_an_unknown_id_is_said_to_be_one(settings: Settings, letter_id: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await dead_letters.find(settings, TOPOLOGY, letter_id)


@pytest.mark.parametrize("forged", [b"many", b"-4", b"", b"9" * 400, b"\xff"])
def test_a_forged_count_of_attempts_is_nought(forged: bytes) -> None:
    raw: Any = Raw("d.job-requests", 0, 0, forged)
    headers = dict(dead_letter_form.headers(raw, "admission", RecordError("schema", "why"), 0))
    assert headers[dead_letter_form.ATTEMPTS] == b"1"


@pytest.mark.parametrize("forged", [b"many", b"-4", b"", b"9" * 400, b"\xff", b"101", None])
def test_a_forged_first_offset_makes_no_record_newer(forged: Any) -> None:
    assert dead_letter_form.first_offset({dead_letter_form.REDRIVEN_OFFSET: forged}, 100) == 100


ERASED = TenantId("0190a1b2-0000-7000-8000-0000000000e1")


def naming(tenant: str) -> bytes:
    """An event that names the tenant, and is refused for something else."""
    return b'{"tenantid":"%s"}' % tenant.encode()


async def test_a_tenants_dead_letters_are_taken_out_and_no_others(settings: Settings) -> None:
    by_key = [await refuse(settings, b"by key", tenant=ERASED, partition=each) for each in (0, 3, 3)]
    by_event = await refuse(settings, naming(ERASED), tenant=OTHER)
    kept = [await refuse(settings, b"kept", tenant=OTHER), await refuse(settings, naming(OTHER), tenant=TENANT)]
    before = [letter.id for letter in await everything(settings)]
    assert {*by_key, by_event, *kept} <= set(before)
    assert await dead_letter_removal.left_of(settings, TOPOLOGY, ERASED) == 4
    assert await dead_letter_removal.take_out(settings, TOPOLOGY, ERASED) == 4
    after = [letter.id for letter in await everything(settings)]
    assert after == [one for one in before if one not in (*by_key, by_event)]
    assert await dead_letter_removal.left_of(settings, TOPOLOGY, ERASED) == 0
    assert await dead_letter_removal.take_out(settings, TOPOLOGY, ERASED) == 0, "a repetition finds nothing"
    with pytest.raises(NotFoundError):
        await dead_letters.find(settings, TOPOLOGY, by_event)
    late = await refuse(settings, b"late", tenant=ERASED)
    assert (await dead_letters.find(settings, TOPOLOGY, late)).value == b"late", "a tombstone is for one dead letter"
    assert await dead_letter_removal.take_out(settings, TOPOLOGY, ERASED) == 1


async def everything(settings: Settings) -> list[dead_letters.DeadLetter]:
    return await dead_letters.select(settings, TOPOLOGY, Selection(), LIST_MAX)


@pytest.mark.slow
async def test_compaction_removes_the_bytes_of_what_was_taken_out_and_nothing_else(settings: Settings) -> None:
    gone = [await refuse(settings, b"gone for good", tenant=ERASED, partition=5) for _ in range(3)]
    kept = [await refuse(settings, b"stays", tenant=OTHER, partition=5) for _ in range(3)]
    assert (await redrive(settings, Selection(ids=frozenset(kept[:1])))).sent == kept[:1]
    before = [(letter.id, letter.redriven) for letter in await everything(settings) if letter.id not in gone]
    topic = full_name(settings.deployment, "dead-letters")
    quick = {"cleanup.policy": "compact,delete", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.001"}
    async with Cluster.of(settings).admin() as client:
        await client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=quick)])
    assert await dead_letter_removal.take_out(settings, TOPOLOGY, ERASED) == 3
    async with asyncio.timeout(200):
        while any(record.value == b"gone for good" for record in await at_origin(settings, "dead-letters", 5)):
            # Each further record closes a segment, which is what the cleaner looks at.
            await refuse(settings, b"closes a segment", tenant=OTHER, partition=5, at_ms=99_000_000)
    after = [(one.id, one.redriven) for one in await everything(settings) if one.value != b"closes a segment"]
    assert after == before
