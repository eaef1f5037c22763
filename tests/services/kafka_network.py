"""A network between the Kafka clients of a test and their broker, which can be bad."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import aiokafka.client

from settler_streams.dev.stack import ports
from tests.chaos.proxy import Proxy


@asynccontextmanager
async def kafka_network(bootstrap_servers: str) -> AsyncIterator[Proxy]:
    """The proxy through which every client connects meanwhile, whatever address the broker names."""
    proxy = Proxy("kafka", ports.free_port(), int(bootstrap_servers.rpartition(":")[2]))
    await proxy.start()
    connect = aiokafka.client.create_conn

    async def through_the_proxy(host: str, _port: int, **options: Any) -> Any:
        return await connect(host, proxy.port, **options)

    try:
        with mock.patch.object(aiokafka.client, "create_conn", through_the_proxy):
            yield proxy
    finally:
        await proxy.stop()
