"""The check: counts the topics and the tables by itself and compares them. It shares no code with the agents.

Claims: every request has one decision; every admitted job has one result; a rejected one has none; Postgres says the
same as the topics; a tenant's matches in Postgres are those that its results announce; the malformed record is a dead
letter, bytes and all.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiokafka
from aiokafka.structs import TopicPartition

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.ids import TenantId
from settler_streams.settings import Settings
from settler_streams.topology import full_name, load_topology

READ_DEADLINE_S = 60.0
"""Longest time for reading the demo's part of four topics: some ten thousand records."""
PROJECTION_DEADLINE_S = 60.0
"""Longest wait until the recorder has caught up."""
TOPICS = ("job-requests", "job-decisions", "job-results", "dead-letters")

Positions = Mapping[TopicPartition, int]
Event = dict[str, Any]


@dataclass
class Verdict:
    """What was counted, and every claim that does not hold."""

    requests: int = 0
    decisions: int = 0
    admitted: int = 0
    results: int = 0
    rows: int = 0
    dead_letters: int = 0
    problems: list[str] = field(default_factory=list)


async def positions(settings: Settings) -> dict[TopicPartition, int]:
    """Where each topic ends now: the demo's own records come after it."""
    consumer = _consumer(settings)
    await consumer.start()
    try:
        return dict(await consumer.end_offsets(_partitions(settings)))
    finally:
        await consumer.stop()


async def check(
    settings: Settings, pool: TenantConnectionPool, tenants: Sequence[TenantId], since: Positions, malformed: bytes
) -> Verdict:
    """Compare the topics, from ``since`` on, with each other and with Postgres."""
    records = await _read(settings, since)
    verdict = Verdict()
    requests = _by_id(records["job-requests"], "settler.job.requested.v1", "id", tenants)
    decisions = _by_id(records["job-decisions"], "settler.job.decided.v1", "job_id", tenants)
    results = _by_id(records["job-results"], "settler.job.finished.v1", "job_id", tenants)
    admitted = {job for job, events in decisions.items() if events[0]["data"]["admitted"]}
    verdict.requests, verdict.decisions = len(requests), sum(map(len, decisions.values()))
    verdict.admitted, verdict.results = len(admitted), sum(map(len, results.values()))
    _claim(verdict, "requests without a decision", requests.keys() - decisions.keys())
    _claim(verdict, "decisions without a request", decisions.keys() - requests.keys())
    _claim(verdict, "jobs decided more than once", {job for job, events in decisions.items() if len(events) > 1})
    _claim(verdict, "admitted jobs without a result", admitted - results.keys())
    _claim(verdict, "results of jobs that were not admitted", results.keys() - admitted)
    _claim(verdict, "jobs with more than one result", {job for job, events in results.items() if len(events) > 1})
    letters = [value for value in records["dead-letters"] if value == malformed]
    verdict.dead_letters = len(records["dead-letters"])
    if len(letters) != 1:
        verdict.problems.append(f"the malformed record is {len(letters)} times among the dead letters, not once")
    await _compare_tables(verdict, pool, tenants, decisions, results)
    return verdict


async def _compare_tables(
    verdict: Verdict,
    pool: TenantConnectionPool,
    tenants: Sequence[TenantId],
    decisions: Mapping[str, list[Event]],
    results: Mapping[str, list[Event]],
) -> None:
    announced: Counter[str] = Counter()
    status: dict[str, str] = {}
    for job, events in decisions.items():
        status[job] = "admitted" if events[0]["data"]["admitted"] else "rejected"
    for job, events in results.items():
        status[job] = events[0]["data"]["status"]
        announced[events[0]["tenantid"]] += events[0]["data"].get("matches", 0)
    for tenant in tenants:
        wanted = {job: s for job, s in status.items() if _tenant(decisions, results, job) == tenant}
        stored = await _stored_jobs(pool, tenant, wanted)
        verdict.rows += len(stored)
        differing = {job for job in wanted.keys() | stored.keys() if wanted.get(job) != stored.get(job)}
        _claim(verdict, f"jobs of tenant {tenant} that Postgres has otherwise", differing)
        async with pool.tenant(tenant) as tx:
            matches = await tx.fetchval("SELECT count(*) FROM accepted_matches")
        if matches != announced[tenant]:
            verdict.problems.append(f"tenant {tenant}: {matches} matches stored, {announced[tenant]} announced")


async def _stored_jobs(pool: TenantConnectionPool, tenant: TenantId, wanted: Mapping[str, str]) -> dict[str, str]:
    """The tenant's jobs once the recorder has caught up, or as they are when it does not in time."""
    stored: dict[str, str] = {}
    try:
        async with asyncio.timeout(PROJECTION_DEADLINE_S):
            while stored != wanted:
                async with pool.tenant(tenant) as tx:
                    rows = await tx.fetch("SELECT job_id, status FROM jobs")
                stored = {str(row["job_id"]): row["status"] for row in rows}
                await asyncio.sleep(0.1)
    except TimeoutError:
        pass  # the difference is what the caller reports
    return stored


def _tenant(decisions: Mapping[str, list[Event]], results: Mapping[str, list[Event]], job: str) -> str:
    events = decisions.get(job) or results[job]
    return str(events[0]["tenantid"])


def _claim(verdict: Verdict, what: str, jobs: set[str]) -> None:
    if jobs:
        verdict.problems.append(f"{len(jobs)} {what}, such as {min(jobs)}")


def _by_id(
    values: Sequence[bytes], event_type: str, id_field: str, tenants: Sequence[TenantId]
) -> dict[str, list[Event]]:
    """Events of the demo's tenants by job id; a request repeated with the same id counts once."""
    events: dict[str, list[Event]] = defaultdict(list)
    wanted = set(tenants)
    for value in values:
        try:
            event = json.loads(value)
        except ValueError:
            continue  # the malformed record; it is looked for among the dead letters
        if isinstance(event, dict) and event.get("type") == event_type and event.get("tenantid") in wanted:
            job = event["id"] if id_field == "id" else event["data"][id_field]
            events[job].append(event)
    return events


async def _read(settings: Settings, since: Positions) -> dict[str, list[bytes]]:
    """The values of every committed record after ``since``, by topic."""
    values: dict[str, list[bytes]] = {topic: [] for topic in TOPICS}
    names = {full_name(settings.deployment, topic): topic for topic in TOPICS}
    consumer = _consumer(settings)
    await consumer.start()
    try:
        async with asyncio.timeout(READ_DEADLINE_S):
            ends = await consumer.end_offsets(list(since))
            consumer.assign(list(since))
            for tp, offset in since.items():
                consumer.seek(tp, offset)
            while any([await consumer.position(tp) < end for tp, end in ends.items()]):
                for tp, records in (await consumer.getmany(timeout_ms=200)).items():
                    values[names[tp.topic]] += [record.value for record in records]
    finally:
        await consumer.stop()
    return values


def _partitions(settings: Settings) -> list[TopicPartition]:
    topology = load_topology()
    return [
        TopicPartition(full_name(settings.deployment, topic), number)
        for topic in TOPICS
        for number in range(topology.partitions(topic))
    ]


def _consumer(settings: Settings) -> aiokafka.AIOKafkaConsumer:
    return Cluster.of(settings).consumer(isolation_level="read_committed", enable_auto_commit=False)
