"""The dead-letter topic for operators: list with bounds, show one, redrive with a rate.

A redrive copies the raw bytes back to the partition they came from, with the offset that they had there, and writes a
marker beside the dead letter, both in one transaction. Its transactional id is one per deployment, so two redrives at a
time fence each other, and the markers are read after the fencing: the same dead letter is redriven once unless the
operator insists.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import aiokafka
from aiokafka.errors import IllegalOperation, KafkaError
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka import dead_letter_form as form
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.fencing import fenced
from settler_streams.adapters.kafka.reading import advance
from settler_streams.adapters.kafka.stopping import stop_producer
from settler_streams.adapters.kafka.tenant_records import DEAD_LETTERS, whose
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.topology import BROKER_LIMIT_FACTOR, Topology, full_name

LIST_MAX = 10_000
"""Dead letters in memory at once: at the usual kilobyte each, ten megabytes."""
READ_DEADLINE_S = 60.0
"""Longest time in which nothing comes while the topic is read."""
REDRIVE_CHUNK_MAX = 100
"""Records per transaction: enough that its few milliseconds do not count, few enough that a rate stays smooth."""
TRANSACTION_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One refused record. ``topic``, ``origin_partition`` and ``origin_offset`` say where it lay; empty if unknown.

    ``key`` is the record's own; ``place`` is what the dead letter is filed under.
    """

    partition: int
    offset: int
    key: bytes | None
    value: bytes
    headers: Mapping[str, bytes]
    redriven: bool = False
    place: bytes = b""

    @property
    def id(self) -> str:
        """Its place among the dead letters, as ``<partition>-<offset>``."""
        return f"{self.partition}-{self.offset}"

    @property
    def tenant(self) -> str:
        """The key: the root tenant, for records of tenant topics."""
        return (self.key or b"").decode(errors="replace")

    def is_of(self, tenants: Set[TenantId]) -> bool:
        """Whether its key or its event names one of ``tenants``."""
        return bool(tenants & {self.tenant, whose(self.key, self.value)})

    @property
    def reason(self) -> str:
        """The machine-readable class of the failure."""
        return self._text(form.REASON)

    @property
    def detail(self) -> str:
        """What exactly was wrong."""
        return self._text(form.DETAIL)

    @property
    def role(self) -> str:
        """Who refused it."""
        return self._text(form.ROLE)

    @property
    def topic(self) -> str:
        """The full name of the topic it came from."""
        return self._text(form.TOPIC)

    @property
    def origin_partition(self) -> int:
        """The partition it came from; -1 when the header is missing."""
        return self._number(form.PARTITION)

    @property
    def origin_offset(self) -> int:
        """The offset it had there; -1 when the header is missing."""
        return self._number(form.OFFSET)

    @property
    def attempts(self) -> int:
        """How often it has been refused."""
        return form.attempts_of(self.headers)

    @property
    def at_ms(self) -> int:
        """When it was refused, by the clock of the fold."""
        return self._number(form.AT_MS)

    @property
    def quarantined(self) -> bool:
        """Refused too often to be worth another try without a look at it."""
        return self.attempts >= form.ATTEMPTS_MAX

    def _text(self, name: str) -> str:
        return self.headers.get(name, b"").decode(errors="replace")

    def _number(self, name: str) -> int:
        text = self.headers.get(name, b"")
        return int(text) if text.isdigit() else -1


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: every given condition has to hold. ``topic`` is the origin's declared name or full name."""

    reason: str | None = None
    tenant: str | None = None
    topic: str | None = None
    since_ms: int | None = None
    ids: frozenset[str] = frozenset()
    open_only: bool = False
    """Leave out what has been redriven, and what is quarantined."""
    erased: frozenset[TenantId] = frozenset()
    """Leave out what is of these tenants: nobody is shown it any more, and it does not go back."""

    def takes(self, letter: DeadLetter) -> bool:
        """Whether ``letter`` is one of them."""
        return (
            (self.reason is None or letter.reason == self.reason)
            and (self.tenant is None or letter.tenant == self.tenant)
            and (self.topic is None or self.topic in (letter.topic, letter.topic.partition(".")[2]))
            and (self.since_ms is None or letter.at_ms >= self.since_ms)
            and (not self.ids or letter.id in self.ids)
            and not (self.open_only and (letter.redriven or letter.quarantined))
            and not (self.erased and letter.is_of(self.erased))
        )


@dataclass(slots=True)
class Redriven:
    """What a redrive did, by id."""

    sent: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)


async def select(settings: Settings, topology: Topology, selection: Selection, limit: int) -> list[DeadLetter]:
    """The selected dead letters that are in the topic now, oldest first within a partition, at most ``limit``.

    Raises:
        InvalidRequestError: ``limit`` is out of bounds.
        UnavailableError: Kafka did not answer.
    """
    if not 1 <= limit <= LIST_MAX:
        raise InvalidRequestError(f"limit {limit}: between 1 and {LIST_MAX}")
    found: list[DeadLetter] = []
    consumer = reader(settings)
    async with translated("reading the dead letters"):
        await consumer.start()
        try:
            for number in range(topology.partitions(DEAD_LETTERS)):
                tp = TopicPartition(full_name(settings.deployment, DEAD_LETTERS), number)
                found += await _read(consumer, tp, selection, limit)
        finally:
            await consumer.stop()
    return sorted(found, key=lambda letter: (letter.at_ms, letter.partition, letter.offset))[:limit]


async def find(
    settings: Settings, topology: Topology, letter_id: str, erased: frozenset[TenantId] = frozenset()
) -> DeadLetter:
    """One dead letter by its id; none of the ``erased`` tenants.

    Raises:
        InvalidRequestError: the id is not of the form ``<partition>-<offset>``.
        NotFoundError: there is none, or no longer.
    """
    partition, _, offset = letter_id.partition("-")
    if not (partition.isdigit() and offset.isdigit()):
        raise InvalidRequestError(f"{letter_id!r} is no dead letter's id; `settler dlq list` shows them, such as 3-120")
    found = await select(settings, topology, Selection(ids=frozenset({letter_id}), erased=erased), 1)
    if not found:
        raise NotFoundError(f"no dead letter {letter_id}; they are kept for 30 days")
    return found[0]


async def redrive(
    settings: Settings,
    topology: Topology,
    selection: Selection,
    *,
    limit: int,
    rate_per_s: int,
    force: bool = False,
    on_sent: Callable[[int], None] = lambda _sent: None,
) -> Redriven:
    """Send the selected dead letters back to where they came from, at most ``rate_per_s`` a second.

    Without ``force`` nothing is sent that is quarantined or already redriven; those that were asked for by id are
    reported. Stopping it half-way is safe: what it has sent is marked as such, in the same transactions.

    Raises:
        ConflictError: another redrive has taken over.
        InvalidRequestError: a dead letter's origin is unknown, or belongs to another deployment.
        UnavailableError: Kafka did not answer; run it again, what was sent is marked.
    """
    producer = _producer(settings, topology)
    outcome = Redriven()
    async with translated("redriving"):
        await producer.start()  # fences a redrive that is under way, so the markers read next are final
        try:
            chosen = selection if selection.ids else replace(selection, open_only=not force)
            letters = await select(settings, topology, chosen, limit)
            wanted = _sort_out(letters, outcome, force=force)
            for letter in wanted:
                _check_origin(settings, topology, letter)
            for chunk in _chunks(wanted, min(REDRIVE_CHUNK_MAX, rate_per_s)):
                began_s = time.monotonic()
                await _send(producer, full_name(settings.deployment, DEAD_LETTERS), chunk)
                outcome.sent += [letter.id for letter in chunk]
                on_sent(len(chunk))
                if len(outcome.sent) < len(wanted):
                    await asyncio.sleep(max(0.0, len(chunk) / rate_per_s - (time.monotonic() - began_s)))
        finally:
            await stop_producer(producer)
    return outcome


def _sort_out(letters: Sequence[DeadLetter], outcome: Redriven, *, force: bool) -> list[DeadLetter]:
    wanted = []
    for letter in letters:
        if letter.redriven and not force:
            outcome.already.append(letter.id)
        elif letter.quarantined and not force:
            outcome.quarantined.append(letter.id)
        else:
            wanted.append(letter)
    return wanted


def _check_origin(settings: Settings, topology: Topology, letter: DeadLetter) -> None:
    prefix, _, name = letter.topic.partition(".")
    known = {topic.name for topic in topology.topics}
    if prefix != settings.deployment or name not in known or name == DEAD_LETTERS:
        raise InvalidRequestError(f"dead letter {letter.id} came from {letter.topic!r}, no topic of this deployment")
    if not 0 <= letter.origin_partition < topology.partitions(name):
        raise InvalidRequestError(f"dead letter {letter.id}: {name} has no partition {letter.origin_partition}")
    if form.CUT in letter.headers:
        raise InvalidRequestError(f"dead letter {letter.id} holds a part of its record, which is too large to go back")


async def _send(producer: aiokafka.AIOKafkaProducer, dead_letters: str, chunk: Sequence[DeadLetter]) -> None:
    async with producer.transaction():
        sent: list[asyncio.Future[Any]] = []
        try:
            for letter in chunk:
                for topic, partition, key, value, headers in _records_of(letter, dead_letters):
                    sent.append(await producer.send(topic, value, key=key, partition=partition, headers=headers))
        except (KafkaError, IllegalOperation):
            # After a refusal the producer takes nothing more; why, only what it had taken can tell.
            await asyncio.gather(*sent)
            raise
        await asyncio.gather(*sent)  # a transaction commits even when a send in it has failed, so each is awaited


def _records_of(
    letter: DeadLetter, dead_letters: str
) -> Iterator[tuple[str, int, bytes | None, bytes, list[tuple[str, bytes]]]]:
    """Topic, partition, key, value and headers of the record, back to where it came from, and of the marker of that."""
    headers = {name: value for name, value in letter.headers.items() if not name.startswith("dl-")}
    headers[form.ATTEMPTS] = str(letter.attempts).encode()
    # It lies behind what came after it now, and must not replace in a projection's rows what that has written.
    headers[form.REDRIVEN_OFFSET] = str(form.first_offset(letter.headers, letter.origin_offset)).encode()
    yield letter.topic, letter.origin_partition, letter.key, letter.value, list(headers.items())
    marker = f"redriven/{letter.id}".encode()
    yield dead_letters, letter.partition, marker, b"", [(form.REDRIVEN, str(letter.offset).encode())]


async def _read(
    consumer: aiokafka.AIOKafkaConsumer, tp: TopicPartition, selection: Selection, limit: int
) -> list[DeadLetter]:
    """The selected dead letters of one partition up to its present end. A marker lies behind its dead letter."""
    found: list[DeadLetter] = []
    async with contextlib.aclosing(letters_in(consumer, tp)) as letters:
        async for letter in letters:
            if selection.takes(letter):
                found.append(letter)
                if len(found) == limit:
                    break
    return found


async def letters_in(consumer: aiokafka.AIOKafkaConsumer, tp: TopicPartition) -> AsyncGenerator[DeadLetter, None]:
    """The dead letters of one partition up to its present end, but for those that a tombstone has taken out.

    It is read twice: markers and tombstones lie behind what they are about.
    """
    consumer.assign([tp])
    end = (await consumer.end_offsets([tp]))[tp]
    redriven: set[int] = set()
    taken_out: set[bytes] = set()
    async with contextlib.aclosing(_records(consumer, tp, end)) as records:
        async for record in records:
            marked = dict(record.headers).get(form.REDRIVEN, b"")
            if marked.isdigit():
                redriven.add(int(marked))
            if record.value is None and record.key is not None:
                taken_out.add(record.key)
    async with contextlib.aclosing(_records(consumer, tp, end)) as records:
        async for record in records:
            headers = dict(record.headers)
            if form.REASON in headers and record.key not in taken_out:
                yield DeadLetter(
                    tp.partition, record.offset, headers.get(form.KEY), record.value or b"", headers,
                    record.offset in redriven, record.key or b"",
                )  # fmt: skip


async def _records(
    consumer: aiokafka.AIOKafkaConsumer, tp: TopicPartition, end: int
) -> AsyncGenerator[aiokafka.ConsumerRecord[Any, Any], None]:
    """Everything from the beginning of ``tp`` up to ``end``; a TimeoutError when nothing more of it comes."""
    async with asyncio.timeout(READ_DEADLINE_S):
        await consumer.seek_to_beginning(tp)
        position = await consumer.position(tp)
    while position < end:
        async with asyncio.timeout(READ_DEADLINE_S):
            records, position = await advance(consumer, tp, position)
        for record in records:
            if record.offset < end:
                yield record


def reader(settings: Settings) -> aiokafka.AIOKafkaConsumer:
    """A consumer for :func:`letters_in`, not started."""
    return Cluster.of(settings).consumer(
        client_id=f"{settings.deployment}.operator",
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=100,
    )


def _producer(settings: Settings, topology: Topology) -> aiokafka.AIOKafkaProducer:
    return Cluster.of(settings).producer(
        transactional_id=f"{settings.deployment}.redrive",
        transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        max_request_size=BROKER_LIMIT_FACTOR * topology.topic(DEAD_LETTERS).max_message_bytes,
        acks="all",
    )


def _chunks(letters: Sequence[DeadLetter], size: int) -> list[Sequence[DeadLetter]]:
    return [letters[start : start + size] for start in range(0, len(letters), size)]


@contextlib.asynccontextmanager
async def translated(doing: str) -> AsyncIterator[None]:
    """Kafka's failures as ours, with what was being done."""
    try:
        yield
    except (KafkaError, IllegalOperation, TimeoutError) as error:
        if fenced(error):
            raise ConflictError(
                "another redrive has taken over; look at `settler dlq list` and run it again"
            ) from error
        raise UnavailableError(f"{doing}: Kafka did not answer: {error!r}") from error


def as_json(letter: DeadLetter) -> dict[str, Any]:
    """A dead letter for machines; see `settler dlq show` for its bytes."""
    return {
        "id": letter.id,
        "at_ms": letter.at_ms,
        "tenant": letter.tenant,
        "reason": letter.reason,
        "detail": letter.detail,
        "role": letter.role,
        "topic": letter.topic,
        "partition": letter.origin_partition,
        "offset": letter.origin_offset,
        "attempts": letter.attempts,
        "quarantined": letter.quarantined,
        "redriven": letter.redriven,
        "bytes": len(letter.value),
    }
