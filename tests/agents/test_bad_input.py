"""Bad input, end to end: a dead letter with its bytes and the reason, and the partition goes on behind it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import aiokafka
import pytest

from settler_streams.adapters.kafka import dead_letter_form as form
from settler_streams.events import (
    ClockTick,
    JobDecided,
    JobFinished,
    JobStatus,
    Resource,
    TenantChanged,
    TenantStatus,
    TenantTier,
    UsageRecorded,
    decode,
)
from settler_streams.ids import PLATFORM, TenantId
from tests.adapters.kafka.spoilt_headers import PLACEHOLDER, spoilt
from tests.agents.conftest import Platform
from tests.runtime.counter import tenant_in
from tests.runtime.kafka_log import Record
from tests.runtime.requests import event_bytes, job_request, new_id

pytestmark = pytest.mark.services

TENANT, NEIGHBOUR = tenant_in(0, 0, 2), tenant_in(0, 1, 2)
MIB = 2**20
DEEP = b"[" * 100_000


@dataclasses.dataclass(frozen=True)
class Bad:
    """One record that can never be decided."""

    name: str
    reason: str
    value: bytes | None
    key: bytes | None = TENANT.encode()
    topic: str = "job-requests"
    headers: tuple[tuple[str, bytes | None], ...] = ()


def changed(change: Callable[[dict[str, Any]], object], data: Any = None) -> bytes:
    """A good event, spoilt."""
    document = json.loads(event_bytes(data or job_request(), TENANT))
    change(document)
    return json.dumps(document, ensure_ascii=False).encode()


def file_at(path: str) -> dict[str, str]:
    return {"source": "file", "path": path, "format": "csv"}


def finished() -> JobFinished:
    return JobFinished(
        job_id=new_id(), status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation", requested_at_ms=0,
        finished_at_ms=0, worker_us=0,
    )  # fmt: skip


def promoted() -> TenantChanged:
    return TenantChanged(
        version=9, slug="t", tier=TenantTier.ENTERPRISE, status=TenantStatus.ACTIVE, root_id=TENANT, quotas={}
    )


BAD = [
    Bad("not-json", "not-json", b"\x00\xff this is no JSON"),
    Bad("truncated", "not-json", event_bytes(job_request(), TENANT)[:-5]),
    Bad("empty", "empty", b""),
    Bad("no-value", "empty", None),
    Bad("array", "schema", b"[1,2,3]"),
    Bad("wrong-schema", "schema", changed(lambda d: d["data"].pop("left"))),
    Bad("wrong-word", "schema", changed(lambda d: d["data"].update(priority="urgent"))),
    Bad("unknown-type", "unknown-type", changed(lambda d: d.update(type="settler.job.wanted.v1"))),
    Bad("unknown-version", "unknown-type", changed(lambda d: d.update(type="settler.job.requested.v9"))),
    Bad("no-tenant", "schema", changed(lambda d: d.pop("tenantid"))),
    Bad("foreign-key", "foreign-tenant", event_bytes(job_request(), TENANT), key=NEIGHBOUR.encode()),
    Bad("platform-tenant", "foreign-tenant", event_bytes(job_request(), PLATFORM)),
    Bad("no-key", "key", event_bytes(job_request(), TENANT), key=None),
    Bad("empty-key", "key", event_bytes(job_request(), TENANT), key=b""),
    Bad("key-not-utf8", "key", event_bytes(job_request(), TENANT), key=b"\xff\xfe"),
    Bad("oversize", "oversize", changed(lambda d: d.update(padding="x" * (MIB + 1)))),
    Bad("near-the-broker-limit", "oversize", b"x" * (2 * MIB - 300)),
    Bad("climbing-path", "outside-tenant", changed(lambda d: d["data"].update(left=file_at("../other/secret.csv")))),
    Bad("absolute-path", "outside-tenant", changed(lambda d: d["data"].update(left=file_at("/etc/passwd")))),
    Bad("nul", "nul-character", changed(lambda d: d["data"].update(kind="a\0b"))),
    Bad("65-bit-integer", "schema", changed(lambda d: d["data"].update(estimated_cost_us=2**64))),
    Bad(
        "digits-without-end", "not-json",
        changed(lambda d: d["data"].update(estimated_cost_us=7)).replace(b": 7", b": " + b"9" * 5000),
    ),
    Bad("nested", "not-json", b'{"type":"settler.job.requested.v1","x":' + DEEP),
    Bad("nested-and-closed", "not-json", b'{"x":' + DEEP + b"]" * len(DEEP) + b"}"),
    Bad("bad-utf8-after-bad-field", "not-json", b'{"type":"settler.job.requested.v1","id":5,"x":"\xff"}'),
    Bad("tick-from-a-producer", "misplaced", event_bytes(ClockTick(role="admission"), TENANT)),
    Bad("result-from-a-producer", "misplaced", event_bytes(finished(), TENANT)),
    Bad("promotion-from-a-producer", "misplaced", event_bytes(promoted(), TENANT)),
    Bad(
        "usage-among-requests", "misplaced",
        event_bytes(UsageRecorded(resource=Resource.REQUESTS, quantity=1), TENANT),
    ),
    Bad("request-among-usage", "misplaced", event_bytes(job_request(), TENANT), topic="usage-events"),
    Bad("garbage-attempts", "empty", b"", headers=(("dl-attempts", b"\xff many"),)),
    Bad("countless-attempts", "empty", b"", headers=(("dl-attempts", b"9" * 6000),)),
    Bad("attempts-beyond-32-bit", "empty", b"", headers=(("dl-attempts", b"99999999999"),)),
    Bad("header-without-value", "empty", b"", headers=(("x", None), ("dl-attempts", None))),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
async def test_bad_input_becomes_a_dead_letter_and_the_next_request_is_decided(platform: Platform, bad: Bad) -> None:
    log, good = platform.log, new_id()
    partition = 0
    (offset,) = await log.append(bad.topic, partition, [(bad.key, bad.value)], list(bad.headers))
    await log.append("job-requests", partition, [(TENANT.encode(), event_bytes(job_request(), TENANT, event_id=good))])

    await log.until("job-decisions", lambda records: good in decided(records))

    await log.until("dead-letters", lambda records: bool(letters(records, log.full(bad.topic), offset)))
    (letter,) = letters(await log.read("dead-letters"), log.full(bad.topic), offset)
    headers = dict(letter.headers)
    assert (headers.get(form.KEY), letter.value) == (bad.key, bad.value or b"")
    assert headers[form.REASON].decode() == bad.reason
    assert headers[form.DETAIL]
    assert (headers[form.ROLE], headers[form.PARTITION]) == (b"admission", str(partition).encode())
    assert 1 <= int(headers[form.ATTEMPTS]) <= 10**9


async def test_every_dead_letter_is_found_in_postgres_by_its_reason(platform: Platform) -> None:
    """Run after the test above: the index of the dead letters has met whatever producers put into headers."""
    await platform.log.append("job-requests", 0, [(TENANT.encode(), b"the last one")])
    expected = await platform.log.until(
        "dead-letters", lambda records: any(r.value == b"the last one" for r in records)
    )
    rows = await _indexed(platform, expected)
    for row, record in zip(rows, expected, strict=True):
        headers = dict(record.headers)
        assert row["reason"] == headers[form.REASON].decode()
        assert row["origin_topic"] == headers[form.TOPIC].decode()
        assert row["attempts"] == int(headers[form.ATTEMPTS])


@pytest.mark.parametrize("partition", [0, 1])
async def test_a_header_name_that_is_no_utf8_stops_nobody(platform: Platform, partition: int) -> None:
    """Neither the fold, whose record it is or not, nor whoever reads what it has forwarded or refused."""
    log, good, refused = platform.log, new_id(), f"refused {partition}".encode()
    async with log.producer() as producer:
        batch = producer.create_batch()
        for value in (event_bytes(job_request(), TENANT, event_id=good), refused):
            batch.append(timestamp=None, key=TENANT.encode(), value=value, headers=[(PLACEHOLDER, b"1")])
        batch._buffer = spoilt(bytes(batch._build()))
        await (await producer.send_batch(batch, log.full("job-requests"), partition=partition))
    await log.until("job-decisions", lambda records: good in decided(records))
    letters = await log.until("dead-letters", lambda records: any(r.value == refused for r in records))
    (letter,) = [record for record in letters if record.value == refused]
    assert letter.headers[0] == ("\\xff\\xfe", b"1")


async def test_an_id_that_another_source_has_used_is_refused(platform: Platform) -> None:
    log, job_id = platform.log, new_id()
    await log.append(
        "job-requests",
        0,
        [
            (TENANT.encode(), event_bytes(job_request(), TENANT, event_id=job_id, source=source))
            for source in ("/first", "/second", "/first")
        ],
    )
    good = new_id()
    await log.append("job-requests", 0, [(TENANT.encode(), event_bytes(job_request(), TENANT, event_id=good))])
    records = await log.until("job-decisions", lambda records: good in decided(records))
    assert decided(records).count(job_id) == 1
    (letter,) = [r for r in await log.read("dead-letters") if r.value and job_id.encode() in r.value]
    assert dict(letter.headers)[form.REASON] == b"id-conflict"
    assert decode(letter.value).source == "/second"


async def test_a_request_in_a_wrong_partition_is_decided_in_the_right_one(platform: Platform) -> None:
    log, good = platform.log, new_id()
    trace = [("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("note", None)]
    await log.append("job-requests", 1, [(TENANT.encode(), event_bytes(job_request(), TENANT, event_id=good))], trace)
    records = await log.until("job-decisions", lambda records: good in decided(records))
    (record,) = [record for record in records if decode(record.value).data.job_id == good]  # type: ignore[attr-defined]
    assert record.partition == 0
    assert dict(record.headers)["traceparent"] == trace[0][1]
    copies = [record for record in await log.read("job-requests") if record.value and good.encode() in record.value]
    assert [copy.partition for copy in copies] == [0, 1]
    assert copies[0].headers == copies[1].headers


async def test_bad_input_in_a_wrong_partition_keeps_its_bytes_too(platform: Platform) -> None:
    log, value = platform.log, b"misrouted and broken"
    await log.append("job-requests", 1, [(TENANT.encode(), value)])
    letters = await log.until("dead-letters", lambda records: any(r.value == value for r in records))
    (letter,) = [record for record in letters if record.value == value]
    assert dict(letter.headers)[form.PARTITION] == b"0"


@pytest.mark.parametrize("partition", [0, 1])
@pytest.mark.parametrize("bloated", ["value", "header", "key"])
async def test_a_record_that_is_small_by_compression_alone_is_kept_in_part(
    platform: Platform, bloated: str, partition: int
) -> None:
    """The broker weighs it compressed; written out, no topic takes it, and neither a forward nor a dead letter fits."""
    log, good, size = platform.log, new_id(), 16 * MIB
    filling = b"x" * size
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=log.settings.kafka_bootstrap_servers, compression_type="gzip", max_request_size=2 * size
    ) as producer:
        stored = await producer.send_and_wait(
            log.full("job-requests"),
            filling if bloated == "value" else b"no event",
            key=filling if bloated == "key" else TENANT.encode(),
            partition=partition,
            headers=[("note", filling)] if bloated == "header" else [],
        )
    await log.append("job-requests", partition, [(TENANT.encode(), event_bytes(job_request(), TENANT, event_id=good))])
    await log.until("job-decisions", lambda records: good in decided(records))
    origin = {form.OFFSET: str(stored.offset).encode(), form.PARTITION: str(partition).encode()}

    def its_letters(records: list[Record]) -> list[Record]:
        return [r for r in records if origin.items() <= dict(r.headers).items() and form.CUT in dict(r.headers)]

    (letter,) = its_letters(await log.until("dead-letters", lambda records: bool(its_letters(records))))
    assert int(dict(letter.headers)[form.CUT]) > size
    if bloated == "value":
        assert len(letter.value) > MIB
    assert filling.startswith(letter.value) or letter.value == b"no event"


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_producer_may_compress(platform: Platform, codec: str) -> None:
    log, good = platform.log, new_id()
    async with aiokafka.AIOKafkaProducer(
        bootstrap_servers=log.settings.kafka_bootstrap_servers, compression_type=codec
    ) as producer:
        value = event_bytes(job_request(), TENANT, event_id=good)
        await producer.send_and_wait(log.full("job-requests"), value, key=TENANT.encode(), partition=0)
    await log.until("job-decisions", lambda records: good in decided(records))


@pytest.mark.parametrize("bytes_", [129, 2 * MIB - 4096])
async def test_a_trace_header_of_any_size_does_no_harm(platform: Platform, bytes_: int) -> None:
    log, good = platform.log, new_id()
    event = event_bytes(job_request(), TENANT, event_id=good)
    await log.append("job-requests", 0, [(TENANT.encode(), event)], [("traceparent", b"0" * bytes_)])
    records = await log.until("job-decisions", lambda records: good in decided(records))
    (record,) = [record for record in records if decode(record.value).data.job_id == good]  # type: ignore[attr-defined]
    assert "traceparent" not in dict(record.headers)


async def test_a_misplaced_promotion_changes_no_tier(platform: Platform) -> None:
    """The bad input above asked for it in a topic that every producer may write."""
    changes = [event for event in await platform.log.events("tenant-signals") if event.tenantid == TENANT]
    versions = [event.data.version for event in changes if event.type == "settler.tenant.acknowledged.v1"]  # type: ignore[attr-defined]
    assert versions == [1]


def decided(records: list[Record]) -> list[str]:
    bodies = [decode(record.value).data for record in records]
    return [body.job_id for body in bodies if isinstance(body, JobDecided)]


def letters(records: list[Record], topic: str, offset: int) -> list[Record]:
    origin = {form.TOPIC: topic.encode(), form.OFFSET: str(offset).encode(), form.PARTITION: b"0"}
    return [r for r in records if origin.items() <= dict(r.headers).items()]


async def _indexed(platform: Platform, expected: list[Record]) -> list[Any]:
    """The index rows of ``expected``, once they are all there."""
    position = {record.partition: record.offset + 1 for record in expected}
    await platform.log.until_recorded(platform.pool, "dead-letters", "dead-letters", position)
    rows = []
    for record in expected:
        tenant = _tenant_of(record)
        async with platform.pool.tenant(tenant) as transaction:
            row = await transaction.fetchrow(
                "SELECT * FROM dead_letters WHERE letter_partition = $1 AND letter_offset = $2",
                record.partition,
                record.offset,
            )
        assert row is not None, record.headers
        rows.append(row)
    return rows


def _tenant_of(record: Record) -> TenantId:
    known = {tenant.encode(): tenant for tenant in (TENANT, NEIGHBOUR)}
    return known.get(dict(record.headers).get(form.KEY), PLATFORM)
