"""A client of Valkey, or of a cluster of them, whose every wait has an end."""

from __future__ import annotations

from typing import TypeAlias

import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLostError
from redis.exceptions import RedisError

from settler_streams.settings import Settings

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 8
"""Per process and user (of a cluster: per node). Enough for some ten thousand calls a second; who has more calls at a
time lets them wait for each other, since a cluster's client refuses where a single server's waits."""
REDIRECTS_MAX = 3
"""Attempts of one call in a cluster: a slot that moved, then a node that was replaced, and one more."""

UNANSWERED = (RedisError, OSError, TimeoutError, AttributeError)
"""How a call ends that got no answer. The last one is what the cluster's client (redis-py 8.1) raises from a connection
that it has itself closed under another call, when it looks at the cluster anew."""

ValkeyClient: TypeAlias = redis.asyncio.Redis | redis.asyncio.RedisCluster


def connect(settings: Settings, *, deadline_s: float) -> ValkeyClient:
    """A client that connects at its first call, each of whose waits for the network ends after ``deadline_s``.

    With ``REDIS_CLUSTER`` the host is any node of a cluster; the client learns the others from it, follows slots that
    move and masters that are replaced, and sends everything to masters, since replicas lag.
    """
    if settings.redis_cluster:
        return redis.asyncio.RedisCluster(
            host=settings.redis_host,
            port=settings.redis_port,
            password=settings.redis_password.get_secret_value() if settings.redis_password else None,
            max_connections=CONNECTIONS_MAX,
            socket_timeout=deadline_s,
            socket_connect_timeout=deadline_s,
            retry=Retry(NoBackoff(), REDIRECTS_MAX),
        )
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url(),
        max_connections=CONNECTIONS_MAX,
        timeout=deadline_s,
        socket_timeout=deadline_s,
        socket_connect_timeout=deadline_s,
        # A connection that Valkey closed (it restarted) is made anew, once; at worst a script runs twice.
        retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionLostError,)),
    )
    return redis.asyncio.Redis.from_pool(pool)


async def disconnect(client: ValkeyClient) -> None:
    """Close the client's connections. One that does not close in time is gone with its process: no reason to fail."""
    try:
        await client.aclose()
    except UNANSWERED as error:
        log.warning("a connection to Valkey was not closed in time", error=repr(error))
