"""The SDK over HTTP does what it does over Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt

import pytest

from settler_streams.client import HttpTransport, JobRejectedError, SettlerClient
from settler_streams.dev.stack import ports
from settler_streams.errors import InvalidRequestError, UnavailableError
from settler_streams.events import InlineRecords, JobFinished, JobStatus, MatchRules, QuotaType, Resource
from settler_streams.ids import JobId, TenantId, uuid7
from tests.gateway.gateways import keyed, running_gateway
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services

ROWS = InlineRecords(rows=({"reference": "a"},))


async def _finish(platform: Platform, tenant_id: TenantId, job_id: str) -> None:
    done = JobFinished(
        job_id=job_id, status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation",
        requested_at_ms=1, finished_at_ms=2, worker_us=3, matches=7,
    )  # fmt: skip
    await platform.publisher.publish("job-results", tenant_id, tenant_id, done)


async def test_submit_and_result(platform: Platform, gateway_url: str) -> None:
    async with (
        keyed(platform, gateway_url) as tenant,
        SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as client,
    ):
        job = await client.submit(left=ROWS, right=ROWS, rules=MatchRules(keys=("reference",)))
        assert (await job.decision(60)).admitted
        await _finish(platform, tenant.id, job.id)
        assert (await job.result(60)).matches == 7
        assert (await job.result(60)).matches == 7, "asked again"
        # Another client, which did not submit it, finds it in the log.
        async with SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as other:
            assert (await other.result(job.id, 60)).matches == 7
        # So does one that submits it again, though nothing about it will be announced any more.
        async with SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as third:
            again = await third.submit(left=ROWS, right=ROWS, rules=MatchRules(), job_id=job.id)
            assert (await again.result(60)).matches == 7


async def test_a_rejection_is_told_with_its_decision(platform: Platform, gateway_url: str) -> None:
    async with (
        keyed(platform, gateway_url, quotas={QuotaType.CONCURRENT_JOBS: 0}) as tenant,
        SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as client,
    ):
        job = await client.submit(left=ROWS, right=ROWS)
        with pytest.raises(JobRejectedError) as caught:
            await job.result(60)
        assert caught.value.decision.quota is QuotaType.CONCURRENT_JOBS
        assert caught.value.decision.limit == 0


async def test_commands_and_results_in_order(platform: Platform, gateway_url: str) -> None:
    async with (
        keyed(platform, gateway_url) as tenant,
        SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as client,
    ):
        await client.record_usage(Resource.STORAGE_BYTES, 10)
        await client.set_flag("new-feature", actor="someone", rollout_per_mille=100)
        await client.kill_flag("new-feature", actor="someone", reason="test")
        now_ms = int(dt.datetime.now(dt.UTC).timestamp() * 1000)
        ids = [uuid7(now_ms) for _ in range(3)]
        await client.cancel(JobId(ids[0]))
        for job_id in ids:
            await _finish(platform, tenant.id, job_id)
        found: list[str] = []
        async with asyncio.timeout(60):
            async for result in client.results("beginning"):
                found.append(result.job_id)
                if len(found) == 3:
                    break
        assert found == ids


async def test_a_client_survives_the_replacement_of_its_gateway(platform: Platform) -> None:
    port = ports.free_port()  # which no outgoing connection takes while no gateway has it
    async with contextlib.AsyncExitStack() as stack:
        async with running_gateway(platform.settings, port=port) as (url, _), keyed(platform, url) as tenant:
            client = SettlerClient(HttpTransport(url, tenant.key), tenant.id)
            await stack.enter_async_context(client)
            job = await client.submit(left=ROWS, right=ROWS)
        # While no gateway runs, the job finishes.
        await _finish(platform, tenant.id, job.id)
        with pytest.raises(UnavailableError):
            await client.record_usage(Resource.STORAGE_BYTES, 1)
        async with running_gateway(platform.settings, port=port):
            assert (await job.result(60)).matches == 7


async def test_a_key_speaks_for_one_tenant(platform: Platform, gateway_url: str) -> None:
    with pytest.raises(InvalidRequestError):
        HttpTransport(gateway_url, "secret")
    async with keyed(platform, gateway_url) as tenant, keyed(platform, gateway_url) as other:
        async with SettlerClient(HttpTransport(gateway_url, tenant.key), other.id) as client:
            with pytest.raises(InvalidRequestError):
                await client.submit(left=ROWS, right=ROWS)
        wrong = SettlerClient(HttpTransport(gateway_url, tenant.key + "x"), tenant.id)
        with pytest.raises(InvalidRequestError, match="401"):
            async with wrong:
                pass
