"""Memory is bounded whatever the lag: in bytes too, for the step in hand and for what is fetched meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import pytest_asyncio

from settler_streams.runtime import reader as reader_module
from settler_streams.runtime.reader import BATCH_RECORDS_MAX, PARTITION_BYTES_MAX, RESPONSE_BYTES_MAX
from settler_streams.runtime.session import Session
from settler_streams.settings import Settings
from tests.runtime import counter
from tests.runtime.counter import fold, spec_of, tenant_in, usage
from tests.runtime.kafka_log import KafkaLog

pytestmark = pytest.mark.services

RECORD_BYTES = 900_000
RECORDS = 48
"""Forty megabytes of lag in one partition: ten times what one fetch may bring."""


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


async def test_a_slow_fold_holds_a_bounded_number_of_bytes_however_far_behind_it_is(log: KafkaLog) -> None:
    for _ in range(RECORDS // 8):
        await log.append("usage-events", 0, [(b"k", b"x" * RECORD_BYTES)] * 8)
    session = Session(spec_of(log), 0)
    await session.open()
    read = 0
    try:
        async with asyncio.timeout(60):
            while read < RECORDS:
                records = await session.fetch(10)
                batch = [record for raws in records.values() for record in raws]
                assert sum(len(record.value) for record in batch) <= PARTITION_BYTES_MAX + RECORD_BYTES
                read += len(batch)
                if read < RECORDS:
                    await prefetched(session)
                    assert held_bytes(session) <= RESPONSE_BYTES_MAX
    finally:
        await session.close()
    assert read == RECORDS


async def test_one_step_takes_a_bounded_number_of_small_records(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "BATCH_RECORDS_MAX", 100)
    assert BATCH_RECORDS_MAX > 100
    await log.append("usage-events", 1, [usage(tenant_in(1))] * 250)
    session = Session(spec_of(log), 1)
    await session.open()
    steps = []
    try:
        async with asyncio.timeout(60):
            while sum(steps) < 250:
                records = await session.fetch(10)
                steps.append(sum(len(raws) for raws in records.values()))
                await fold(session, records)
    finally:
        await session.close()
    assert max(steps) == 100
    assert session.state[f"sum/{tenant_in(1)}"].records == 250  # type: ignore[attr-defined]


async def prefetched(session: Session) -> None:
    """Wait until the client has fetched ahead as far as it does while nothing is taken from it."""
    fetcher: Any = session._consumer._fetcher  # type: ignore[union-attr]
    while not fetcher._records or fetcher._in_flight:
        await asyncio.wait([fetcher._fetch_task], timeout=0.01)


def held_bytes(session: Session) -> int:
    fetcher: Any = session._consumer._fetcher  # type: ignore[union-attr]
    return sum(result._partition_records._records.size_in_bytes() for result in fetcher._records.values())
