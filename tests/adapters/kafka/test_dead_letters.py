"""Dead letters on a real broker: bounded listing, redrive to the origin, markers, quarantine, fencing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiokafka
import pytest
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import broker, dead_letter_form, dead_letters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import LIST_MAX, Selection
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, RecordError
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology

if TYPE_CHECKING:
    from tests.services.interface import Services

pytestmark = pytest.mark.services

TOPOLOGY = load_topology()
TENANT = "0190a1b2-0000-7000-8000-0000000000a1"
OTHER = "0190a1b2-0000-7000-8000-0000000000b2"


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

    def __init__(self, topic: str, partition: int, offset: int, attempts: bytes | None = None) -> None:
        self.topic, self.partition, self.offset = topic, partition, offset
        self.headers: tuple[tuple[str, bytes], ...] = (("traceparent", b"00-ab-cd-01"),)
        if attempts is not None:
            self.headers += ((dead_letter_form.ATTEMPTS, attempts),)


async def refuse(
    settings: Settings, value: bytes, *, reason: str = "schema", tenant: str = TENANT, partition: int = 3,
    attempts: bytes | None = None, at_ms: int = 1_000, topic: str = "job-requests",
) -> str:  # fmt: skip
    raw: Any = Raw(full_name(settings.deployment, topic), partition, 41, attempts)
    headers = dead_letter_form.headers(raw, "admission", RecordError(reason, "why"), at_ms)
    async with producing(settings) as producer:
        stored = await producer.send_and_wait(
            full_name(settings.deployment, "dead-letters"), value, key=tenant.encode(), partition=partition,
            headers=headers,
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
    assert (letter.origin_partition, letter.origin_offset) == (3, 41)
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
    assert dict(record.headers) == {"traceparent": b"00-ab-cd-01", dead_letter_form.ATTEMPTS: b"2"}
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
