"""The Kafka transport where there is no Kafka."""

from __future__ import annotations

import socket

import pytest

from settler_streams.client.kafka import KafkaTransport
from settler_streams.errors import UnavailableError
from settler_streams.settings import Settings


async def test_a_start_that_failed_can_be_tried_again() -> None:
    """It must not pass for started: what is sent then would wait for a producer that never connects."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        settings = Settings(kafka_bootstrap_servers=f"127.0.0.1:{taken.getsockname()[1]}")
        transport = KafkaTransport(settings)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await transport.start()
