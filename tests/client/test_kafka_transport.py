"""The client over Kafka: whose an answer is, and what needs no broker."""

from __future__ import annotations

import time

import pytest

from settler_streams.client import HttpTransport, JobRejectedError, KafkaTransport, SettlerClient
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import InlineRecords, JobFinished, JobStatus, MatchRules
from settler_streams.ids import PLATFORM, JobId, TenantId, partition_of, uuid7
from settler_streams.settings import Settings
from settler_streams.topology import load_topology
from tests.runtime.requests import ROW
from tests.services_layer.platform import Platform

NOWHERE = Settings(kafka_bootstrap_servers="127.0.0.1:1")
ROWS = InlineRecords(rows=({"reference": "a"},))


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


@pytest.mark.parametrize(
    "rules",
    [
        MatchRules(keys=("amount",)),
        MatchRules(keys=("reference", "reference")),
        MatchRules(keys=(), currency_must_match=False),
        MatchRules(date_window_days="3"),
    ],
)
async def test_rules_that_nothing_can_be_matched_by_are_refused_before_they_are_sent(rules: MatchRules) -> None:
    client = SettlerClient(KafkaTransport(NOWHERE), TenantId("0190a1b2-0000-7000-8000-0000000000a1"))
    records = InlineRecords(rows=(ROW,))
    with pytest.raises(InvalidRequestError, match="rules"):
        await client.submit(left=records, right=records, rules=rules)


@pytest.mark.parametrize("over", ["kafka", "http"])
@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "order-17",
        "A1A20D7F-7F9A-7306-8B49-357F97FF80E0",
        "a1a20d7f-7f9a-4306-8b49-357f97ff80e0",
        "a1a20d7f7f9a73068b49357f97ff80e0",
    ],
)
async def test_a_job_id_under_which_the_job_would_not_run_is_refused(over: str, job_id: str) -> None:
    tenant = TenantId(uuid7(1))
    transport = KafkaTransport(NOWHERE) if over == "kafka" else HttpTransport("http://127.0.0.1:1", f"sk_{tenant}_x")
    with pytest.raises(InvalidRequestError, match="a job's id is a UUIDv7"):
        await SettlerClient(transport, tenant).submit(left=ROWS, right=ROWS, job_id=JobId(job_id))


@pytest.mark.services
async def test_tenants_of_one_transport_that_choose_the_same_job_id_get_their_own_answers(platform: Platform) -> None:
    count = load_topology().partitions("job-requests")
    admitted = (await platform.new_tenant()).tenant.id
    elsewhere = (TenantId(uuid7(n)) for n in range(1000))  # within a partition, admission takes an id once
    refused = next(tenant for tenant in elsewhere if partition_of(tenant, count) != partition_of(admitted, count))
    job_id = JobId(uuid7(time.time_ns() // 1_000_000))
    transport = KafkaTransport(platform.settings)
    async with SettlerClient(transport, refused) as other, SettlerClient(transport, admitted) as client:
        jobs = [await each.submit(left=ROWS, right=ROWS, job_id=job_id) for each in (other, client)]
        assert [(await job.decision(60)).admitted for job in jobs] == [False, True]
        for tenant, matches in ((refused, 1), (admitted, 7)):
            done = JobFinished(
                job_id=job_id, status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation", requested_at_ms=1,
                finished_at_ms=2, worker_us=3, matches=matches,
            )  # fmt: skip
            await platform.publisher.publish("job-results", tenant, tenant, done)
        assert (await client.result(job_id, 60)).matches == 7
        with pytest.raises(JobRejectedError):
            await other.result(job_id, 60)
