"""How long a session may load its state: as long as it gets on, and no longer than tombstones are kept."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable

import pytest
import pytest_asyncio

from settler_streams.errors import UnavailableError
from settler_streams.runtime import reader as reader_module
from settler_streams.runtime import session as session_module
from settler_streams.runtime.intake import Raw
from settler_streams.runtime.session import Session
from settler_streams.runtime.state import Overlay, StateCodec
from settler_streams.settings import Settings
from tests.chaos.proxy import Proxy, Weather
from tests.runtime import counter
from tests.runtime.counter import Counter, Sum, spec_of
from tests.runtime.kafka_log import KafkaLog
from tests.services.kafka_network import kafka_network

pytestmark = pytest.mark.services

DEADLINE_S = 5.0
"""Of opening, in these tests: many times what all else than loading takes."""
RESPONSE_BYTES = 32 * 1024
"""One answer to the loader: half a second of the slow network."""
SLOW = Weather(bytes_per_s=2 * RESPONSE_BYTES)
ANSWERS = 24
"""The changelog's length: the slow network needs more than twice the deadline for it."""
KEYS = ANSWERS * RESPONSE_BYTES // 128

_partitions = itertools.count()


@pytest_asyncio.fixture(scope="module")
async def log(settings: Settings) -> KafkaLog:
    """The counter's topics."""
    log = KafkaLog(settings, counter.TOPOLOGY)
    await log.create()
    return log


@pytest_asyncio.fixture
async def network(log: KafkaLog) -> AsyncIterator[Proxy]:
    """Between the clients and the broker."""
    async with kafka_network(log.settings.kafka_bootstrap_servers) as network:
        yield network


@pytest_asyncio.fixture
async def session(log: KafkaLog, network: Proxy, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Session]:
    """One that has not been opened, whose changelog takes longer to load than any opening may do nothing."""
    partition = next(_partitions)
    value = StateCodec(Counter.kinds).encode(Sum(1, 1))
    await log.append("counter-changelog", partition, [(f"sum/{number:0120}".encode(), value) for number in range(KEYS)])
    monkeypatch.setattr(session_module, "OPEN_DEADLINE_S", DEADLINE_S)
    monkeypatch.setattr(reader_module, "PARTITION_BYTES_MAX", RESPONSE_BYTES)
    network.set(SLOW)
    session = Session(spec_of(log), partition)
    yield session
    network.set(Weather())
    await session.close()


@pytest.mark.slow
async def test_a_load_takes_as_long_as_it_takes_while_it_gets_on(session: Session) -> None:
    await session.open()
    assert len(session.state) == KEYS


@pytest.mark.slow
async def test_a_load_that_no_longer_gets_on_fails(
    session: Session, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker falls silent when the load has taken longer than the deadline already."""
    load_changelog = Overlay.load_changelog
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    silent = asyncio.Event()

    def then_silence(self: Overlay, codec: StateCodec, records: Iterable[Raw]) -> None:
        load_changelog(self, codec, records)
        if loop.time() - began_s > DEADLINE_S:
            network.set(Weather(silent=True))
            silent.set()

    monkeypatch.setattr(Overlay, "load_changelog", then_silence)
    with pytest.raises(UnavailableError, match="could not take over the fold: TimeoutError"):
        await session.open()
    assert silent.is_set()
    assert session.lost


async def test_a_load_that_outlasts_the_tombstones_fails(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "LOAD_DEADLINE_S", DEADLINE_S / 2)
    with pytest.raises(UnavailableError, match="could not take over the fold: TimeoutError"):
        await session.open()
    assert 0 < len(session.state) < KEYS
