"""The load: what each tenant sends to Kafka, good and bad, at its own pace; and a ledger of what was stored."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import aiokafka
from aiokafka.errors import KafkaError

from settler_streams.settings import Settings
from tests.chaos import made_events
from tests.chaos.made_events import Event
from tests.chaos.murmur import partition_of
from tests.chaos.pace import elapse

BEAT_S = 0.05
PENDING_MAX = 3_000
"""Records that await the broker at most; while it is down the producers wait."""
POISONED, DUPLICATED, MISPLACED, CANCELLED = 0.01, 0.10, 0.01, 0.03
"""Shares of the records."""
LATE_S_MAX = 7_200.0
FUTURE_S_MAX = 3_600.0
REPEAT_S_MAX = 5.0
"""A duplicate comes this much later at most: while its id is remembered, and while others come in between."""
RECENT = 50


@dataclass(frozen=True)
class Tenant:
    """A tenant, and how much it sends a second: job requests, usage events, flag commands."""

    id: str
    root: str
    name: str
    requests_per_s: float = 0.0
    usage_per_s: float = 0.0
    flags_per_s: float = 0.0


@dataclass
class Sent:
    """One record that a producer has sent. ``stored`` is None while, or if for ever, nobody knows."""

    topic: str
    kind: str
    id: str
    tenant: str
    partition: int
    stored: bool | None = None


class Load:
    """Sends until told to stop. ``ledger`` holds every record by its number, which its header carries."""

    def __init__(self, settings: Settings, tenants: Sequence[Tenant], partitions: int, seed: int) -> None:
        self._settings = settings
        self._partitions = partitions
        self._chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._draws = {
            (tenant.name, what): random.Random(f"{seed} {tenant.name} {what}")  # noqa: S311
            for tenant in tenants
            for what in ("request", "usage", "flag")
        }
        """For each stream of a tenant's, so that its n-th event is the same however the streams interleave."""
        self._credit: Counter[tuple[str, str]] = Counter()
        self._pending = 0
        self._repeats: deque[tuple[float, str, bytes | None, bytes | None, Sent]] = deque()
        self._recent: dict[str, deque[Event]] = {tenant.id: deque(maxlen=RECENT) for tenant in tenants}
        self.tenants = tenants
        self.ledger: dict[int, Sent] = {}
        self.producers = 0
        self.pace = 1.0

    async def run(self, stop: asyncio.Event) -> None:
        """Send; a producer whose fate is uncertain is replaced, as a client would do."""
        while not stop.is_set():
            producer = aiokafka.AIOKafkaProducer(
                bootstrap_servers=self._settings.kafka_bootstrap_servers, enable_idempotence=True, acks="all",
                linger_ms=5, max_request_size=4 * 2**20, retry_backoff_ms=100,
            )  # fmt: skip
            self.producers += 1
            try:
                await producer.start()
            except KafkaError:
                await producer.stop()
                await elapse(1.0, stop)
                continue
            try:
                await self._send_until(producer, stop)
            finally:
                await producer.stop()

    async def _send_until(self, producer: aiokafka.AIOKafkaProducer, stop: asyncio.Event) -> None:
        self._broken = False
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while not stop.is_set() and not self._broken:
            await elapse(BEAT_S, stop)
            passed_s, last_s = loop.time() - last_s, loop.time()
            if self._pending > PENDING_MAX:
                continue
            try:
                await self._beat(producer, min(passed_s, 1.0))
            except KafkaError:
                return

    async def _beat(self, producer: aiokafka.AIOKafkaProducer, passed_s: float) -> None:
        due = list(self.tenants)
        self._chance.shuffle(due)
        for tenant in due:
            for _ in range(self._owed(tenant, "request", tenant.requests_per_s * passed_s)):
                await self._request(producer, tenant)
            for _ in range(self._owed(tenant, "usage", tenant.usage_per_s * passed_s)):
                await self._usage(producer, tenant)
            for _ in range(self._owed(tenant, "flag", tenant.flags_per_s * passed_s)):
                await self._flag(producer, tenant)
        await self._repeat(producer)

    def _owed(self, tenant: Tenant, what: str, amount: float) -> int:
        self._credit[tenant.id, what] += amount * self.pace  # type: ignore[assignment]
        whole = int(self._credit[tenant.id, what])
        self._credit[tenant.id, what] -= whole
        return whole

    async def _request(self, producer: aiokafka.AIOKafkaProducer, tenant: Tenant) -> None:
        chance = self._draws[tenant.name, "request"]
        written = made_events.event("settler.job.requested.v1", tenant.id, made_events.request_body(chance), chance)
        if chance.random() < POISONED:
            await self._poison(producer, "job-requests", tenant, written, chance)
            return
        kind = "plain"
        if chance.random() < 0.3:
            kind, written = "newer", made_events.as_newer_writer(written)
        home = partition_of(tenant.root.encode(), self._partitions)
        partition = home
        if chance.random() < MISPLACED:
            kind, partition = "misplaced", (home + 1) % self._partitions
        value, key = made_events.encoded(written), tenant.root.encode()
        await self._send(
            producer,
            "job-requests",
            partition,
            key,
            value,
            Sent("job-requests", kind, written["id"], tenant.id, partition),
        )
        self._recent[tenant.id].append(written)
        if chance.random() < DUPLICATED:
            self._repeat_later(
                "job-requests", key, value, Sent("job-requests", "duplicate", written["id"], tenant.id, home)
            )
        if chance.random() < CANCELLED:
            body = {"job_id": written["id"], "reason": "not wanted any more"}
            cancel = made_events.event("settler.job.cancel-requested.v1", tenant.id, body, chance)
            sent = Sent("job-requests", "cancel", cancel["id"], tenant.id, home)
            self._repeat_later("job-requests", key, made_events.encoded(cancel), sent)

    async def _usage(self, producer: aiokafka.AIOKafkaProducer, tenant: Tenant) -> None:
        """Late, future-dated and out of order: its own time is anywhere within three hours."""
        chance = self._draws[tenant.name, "usage"]
        at = dt.datetime.now(dt.UTC)
        if chance.random() < 0.5:
            at += dt.timedelta(seconds=chance.uniform(-LATE_S_MAX, FUTURE_S_MAX))
        resource = chance.choice(("storage_bytes", "storage_bytes", "custom_domains", "worker_us"))
        body = {"resource": resource, "quantity": chance.randint(-3, 9) * (1000 if resource == "storage_bytes" else 1)}
        written = made_events.event("settler.usage.recorded.v1", tenant.id, body, chance, at)
        if chance.random() < POISONED:
            await self._poison(producer, "usage-events", tenant, written, chance)
            return
        home = partition_of(tenant.root.encode(), self._partitions)
        value, key = made_events.encoded(written), tenant.root.encode()
        await self._send(
            producer, "usage-events", home, key, value, Sent("usage-events", "plain", written["id"], tenant.id, home)
        )
        if chance.random() < DUPLICATED:
            self._repeat_later(
                "usage-events", key, value, Sent("usage-events", "duplicate", written["id"], tenant.id, home)
            )

    async def _flag(self, producer: aiokafka.AIOKafkaProducer, tenant: Tenant) -> None:
        chance = self._draws[tenant.name, "flag"]
        body = {
            "flag": f"feature.{chance.randint(1, 5)}", "scope": "tenant", "actor": "chaos",
            "action": chance.choice(("set", "set", "kill", "revive", "delete")), "enabled": chance.random() < 0.5,
        }  # fmt: skip
        written = made_events.event("settler.flag.command.v1", tenant.id, body, chance)
        if chance.random() < POISONED:
            await self._poison(producer, "flag-commands", tenant, written, chance)
            return
        home = partition_of(tenant.root.encode(), self._partitions)
        value, key = made_events.encoded(written), tenant.root.encode()
        await self._send(
            producer, "flag-commands", home, key, value, Sent("flag-commands", "plain", written["id"], tenant.id, home)
        )
        if chance.random() < DUPLICATED:
            self._repeat_later(
                "flag-commands", key, value, Sent("flag-commands", "duplicate", written["id"], tenant.id, home)
            )

    async def _poison(
        self, producer: aiokafka.AIOKafkaProducer, topic: str, tenant: Tenant, written: Event, chance: random.Random
    ) -> None:
        name, bad = made_events.poison({**written, "root": tenant.root}, chance, request=topic == "job-requests")
        key = tenant.root.encode()
        home = partition_of(key, self._partitions)
        await self._send(
            producer, topic, home, bad.key, bad.value, Sent(topic, f"poison/{name}", written["id"], tenant.id, home)
        )

    def _repeat_later(self, topic: str, key: bytes, value: bytes, sent: Sent) -> None:
        due_s = asyncio.get_running_loop().time() + self._chance.uniform(0.0, REPEAT_S_MAX)
        self._repeats.append((due_s, topic, key, value, sent))

    async def _repeat(self, producer: aiokafka.AIOKafkaProducer) -> None:
        now_s = asyncio.get_running_loop().time()
        due = [entry for entry in self._repeats if entry[0] <= now_s]
        self._repeats = deque(entry for entry in self._repeats if entry[0] > now_s)
        for _, topic, key, value, sent in due:
            await self._send(producer, topic, sent.partition, key, value, sent)

    async def _send(
        self, producer: aiokafka.AIOKafkaProducer, topic: str, partition: int, key: bytes | None, value: bytes | None,
        sent: Sent,
    ) -> None:  # fmt: skip
        number = len(self.ledger)
        self.ledger[number] = sent
        headers = [("chaos-number", str(number).encode()), ("chaos-kind", sent.kind.encode())]
        full = f"{self._settings.deployment}.{topic}"
        future = await producer.send(full, value, key=key, partition=partition, headers=headers)
        self._pending += 1
        future.add_done_callback(lambda done: self._acknowledged(sent, done))

    def _acknowledged(self, sent: Sent, done: asyncio.Future[object]) -> None:
        self._pending -= 1
        if done.cancelled() or done.exception() is not None:
            self._broken = True
            return
        sent.stored = True

    @property
    def pending(self) -> int:
        """Records that await the broker's answer."""
        return self._pending
