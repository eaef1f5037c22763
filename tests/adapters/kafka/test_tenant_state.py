"""What compacted topics still say of a tenant: newest values count, and silence does not hold the look up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiokafka
import pytest

from settler_streams.adapters.kafka import broker, tenant_state
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.tenant_state import TenantState
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, partition_of
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology

if TYPE_CHECKING:
    from tests.services.interface import Services

pytestmark = pytest.mark.services

TOPOLOGY = load_topology()
TENANT = TenantId("0190a1b2-0000-7000-8000-0000000000a1")
OTHER = TenantId("0190a1b2-0000-7000-8000-0000000000b2")
CHANGELOG = next(fold.changelog for fold in TOPOLOGY.folds if fold.role == "admission")


@pytest.fixture(scope="module")
async def settings(services: Services, kafka: object, deployment: str) -> Settings:
    made = services.settings.model_copy(update={"deployment": deployment})
    async with Cluster.of(made).admin() as client:
        await broker.apply(client, TOPOLOGY.declared(deployment))
    return made


async def changed(settings: Settings, key: str, value: bytes | None) -> None:
    """A record of admission's changelog, in the partition of ``TENANT``."""
    async with aiokafka.AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers) as producer:
        await producer.send_and_wait(
            full_name(settings.deployment, CHANGELOG),
            value,
            key=key.encode(),
            partition=partition_of(TENANT, TOPOLOGY.tenant_partitions),
        )


async def test_the_newest_value_of_a_key_counts_and_a_marker_does_not(settings: Settings) -> None:
    async with TenantState(settings, TOPOLOGY, TENANT, TENANT).opened() as state:
        assert await state.mentions() == {}
        await changed(settings, f"tenant/{TENANT}", b"x")
        await changed(settings, f"tenant/{OTHER}", b'{"parent":"' + TENANT.encode() + b'"}')
        await changed(settings, f"tenant/{OTHER}/alone", b"x")
        await changed(settings, f"erased/{TENANT}", b"x")
        assert await state.mentions() == {
            full_name(settings.deployment, CHANGELOG): [f"tenant/{TENANT}", f"tenant/{OTHER}"]
        }
        await changed(settings, f"tenant/{TENANT}", None)
        await changed(settings, f"tenant/{OTHER}", b'{"parent":null}')
        assert await state.mentions() == {}


async def test_records_that_do_not_come_end_the_look(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with TenantState(settings, TOPOLOGY, TENANT, TENANT).opened() as state:
        await state.mentions()
        await changed(settings, f"tenant/{TENANT}", b"x")
        partitions = list(state._found)
        state._consumer.pause(*partitions)  # as a partition without a leader: it has an end and gives nothing
        with monkeypatch.context() as patched:
            patched.setattr(tenant_state, "CALL_S_MAX", 1.0)
            with pytest.raises(UnavailableError, match=f"nothing more of .*{CHANGELOG}"):
                await state.mentions()
        state._consumer.resume(*partitions)
        assert list(await state.mentions()) == [full_name(settings.deployment, CHANGELOG)]
        await changed(settings, f"tenant/{TENANT}", None)
