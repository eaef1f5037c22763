"""The live broker against the declared topology: what is missing, what differs, and how to put it right."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import TopicAlreadyExistsError, for_code

from settler_streams.adapters.kafka.cluster import ADMIN_DEADLINE_S
from settler_streams.errors import ConfigurationError, UnavailableError
from settler_streams.topology import Declared

SHOWN_RETRY_S = 0.05
"""Between two looks for new topics, which take half a second to be seen."""
_OF_THE_TOPIC = 1
"""Where a configuration entry comes from, in Kafka's protocol: it was set on this topic, and is no broker's default."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the broker departs from the declaration. ``repairable`` ones are put right by ``apply``."""

    topic: str
    what: str
    declared: str
    live: str
    repairable: bool


async def compare(client: AIOKafkaAdminClient, declared: Sequence[Declared]) -> list[Difference]:
    """Every difference between the declaration and the broker; empty when they agree.

    Raises:
        KafkaError: the broker does not show a topic's configuration, for want of a right, say.
    """
    live = {name for name in await client.list_topics() if not name.startswith("__")}
    differences = [Difference(d.topic, "topic", "exists", "missing", True) for d in declared if d.topic not in live]
    present = [d for d in declared if d.topic in live]
    if not present:
        return differences
    described = {d["topic"]: d for d in await client.describe_topics([d.topic for d in present])}
    for wanted in present:
        count = len(described[wanted.topic]["partitions"])
        if count != wanted.partitions:
            # More partitions would move tenants to other folds; the state would stay behind.
            differences.append(Difference(wanted.topic, "partitions", str(wanted.partitions), str(count), False))
    for wanted, config in zip(present, await _configs(client, present), strict=True):
        differences += [
            Difference(wanted.topic, name, value, config.values.get(name, ""), True)
            for name, value in wanted.config.items()
            if config.values.get(name) != value
        ]
    return differences


async def apply(client: AIOKafkaAdminClient, declared: Sequence[Declared], replication: int = 1) -> list[Difference]:
    """Create what is missing and set what differs; returns what was done. Safe to run twice and from two processes.

    What else was set on a topic, such as ``min.insync.replicas``, stays.

    Raises:
        ConfigurationError: a topic has another partition count; that cannot be repaired without moving tenants.
        KafkaError: the broker refuses a topic or its configuration.
        UnavailableError: the broker did not show the new topics in time.
    """
    differences = await compare(client, declared)
    if stuck := [d for d in differences if not d.repairable]:
        raise ConfigurationError(
            "; ".join(f"{d.topic}: {d.what} is {d.live}, declared {d.declared}" for d in stuck)
            + "; a partition count holds for the life of a deployment: choose another SETTLER_DEPLOYMENT"
        )
    missing = {d.topic for d in differences if d.what == "topic"}
    new = [
        NewTopic(d.topic, num_partitions=d.partitions, replication_factor=replication, topic_configs=d.config)
        for d in declared
        if d.topic in missing
    ]
    if new:
        await _create(client, new)
    changed = {d.topic for d in differences if d.what != "topic"}
    if differing := [d for d in declared if d.topic in changed]:
        await _set(client, differing)
    return differences


async def _create(client: AIOKafkaAdminClient, new: Sequence[NewTopic]) -> None:
    """Create topics and wait until the broker shows them: its answer comes half a second before."""
    response = await client.create_topics(list(new), timeout_ms=int(ADMIN_DEADLINE_S * 1000))
    for topic, error_code, *_ in response.topic_errors:
        if error_code and for_code(error_code) is not TopicAlreadyExistsError:  # another process may have been faster
            raise for_code(error_code)(topic)
    wanted = {topic.name for topic in new}
    try:
        async with asyncio.timeout(ADMIN_DEADLINE_S):
            while not wanted <= set(await client.list_topics()):  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(SHOWN_RETRY_S)
    except TimeoutError as error:
        raise UnavailableError(f"the broker has not shown its new topics in {ADMIN_DEADLINE_S:.0f} s") from error


async def _set(client: AIOKafkaAdminClient, differing: Sequence[Declared]) -> None:
    """Set the declared configuration of existing topics. The request replaces all that was ever set on a topic."""
    resources = [
        ConfigResource(ConfigResourceType.TOPIC, d.topic, configs=live.set_on_topic | d.config)
        for d, live in zip(differing, await _configs(client, differing), strict=True)
    ]
    for response in await client.alter_configs(resources):
        for error_code, message, _, topic in response.resources:
            if error_code:
                raise for_code(error_code)(f"{topic}: {message}")


async def require(client: AIOKafkaAdminClient, partitions: Mapping[str, int]) -> None:
    """Make sure that topics exist with exactly these partition counts.

    Raises:
        ConfigurationError: names each topic that is missing or has another count.
    """
    live = set(await client.list_topics()) & partitions.keys()
    counts = {d["topic"]: len(d["partitions"]) for d in await client.describe_topics(sorted(live))} if live else {}
    problems = [
        f"{topic} is missing" if topic not in counts else f"{topic} has {counts[topic]} partitions instead of {wanted}"
        for topic, wanted in sorted(partitions.items())
        if counts.get(topic) != wanted
    ]
    if problems:
        raise ConfigurationError(f"{'; '.join(problems)}; `settler topology apply` creates what is missing")


class _Live(NamedTuple):
    """A topic's configuration as it is in force, and the part of it that was set on the topic."""

    values: dict[str, str]
    set_on_topic: dict[str, str]


async def _configs(client: AIOKafkaAdminClient, declared: Sequence[Declared]) -> list[_Live]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, d.topic) for d in declared]
    by_topic: dict[str, _Live] = {}
    for response in await client.describe_configs(resources):
        for error_code, message, _, topic, entries in response.resources:
            if error_code:
                raise for_code(error_code)(f"{topic}: {message}")
            values = {entry[0]: entry[1] for entry in entries}
            own = {entry[0]: entry[1] for entry in entries if entry[3] == _OF_THE_TOPIC}
            by_topic[topic] = _Live(values, own)
    return [by_topic[d.topic] for d in declared]
