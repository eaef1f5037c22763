"""The ticker: what it says when Kafka is not there. That it ticks, every test of an agent shows."""

from __future__ import annotations

import pytest

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.errors import UnavailableError
from settler_streams.runtime.ticker import Ticker


async def test_a_ticker_that_cannot_reach_kafka_says_so() -> None:
    nobody_listens = Cluster("127.0.0.1:1", {"security_protocol": "PLAINTEXT"})
    with pytest.raises(UnavailableError, match="the ticker of admission could not start"):
        await Ticker("admission", "clock-ticks", nobody_listens, lambda: [0]).run()
