"""The client over Kafka, where no broker is needed."""

from __future__ import annotations

import pytest

from settler_streams.client import KafkaTransport, SettlerClient
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.settings import Settings

NOWHERE = Settings(kafka_bootstrap_servers="127.0.0.1:1")


@pytest.mark.parametrize("tenant", ["", "acme", "A1A20D7F-7F9A-7306-8B49-357F97FF80E0"])
def test_a_client_needs_its_tenants_id(tenant: str) -> None:
    with pytest.raises(InvalidRequestError, match="tenant's id"):
        SettlerClient(KafkaTransport(NOWHERE), TenantId(tenant))
    with pytest.raises(InvalidRequestError, match="tenant's id"):
        SettlerClient(KafkaTransport(NOWHERE), PLATFORM, root=TenantId(tenant or "none"))


async def test_a_start_that_failed_is_tried_anew() -> None:
    transport = KafkaTransport(NOWHERE)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"Kafka at 127\.0\.0\.1:1 did not answer"):
            await transport.start()
