"""The SDK over HTTP does what it does over Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from typing import Any
from unittest import mock

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


async def test_whoever_awaits_a_result_gets_it_though_the_job_is_submitted_again(
    platform: Platform, gateway_url: str
) -> None:
    async with (
        keyed(platform, gateway_url) as tenant,
        SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as client,
    ):
        job = await client.submit(left=ROWS, right=ROWS)
        waiting = asyncio.create_task(job.result(60))
        with mock.patch.object(HttpTransport, "_look_result_up", side_effect=AssertionError("followed all along")):
            await client.submit(left=ROWS, right=ROWS, job_id=job.id)
            with (
                mock.patch.object(HttpTransport, "_send", side_effect=UnavailableError),
                pytest.raises(UnavailableError),
            ):
                await client.submit(left=ROWS, right=ROWS, job_id=job.id)
            await _finish(platform, tenant.id, job.id)
            assert (await waiting).matches == 7


async def test_whoever_awaits_a_result_looks_it_up_when_its_submission_fails(
    platform: Platform, gateway_url: str
) -> None:
    async with (
        keyed(platform, gateway_url) as tenant,
        SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id) as client,
    ):
        job_id, send = JobId(uuid7(int(dt.datetime.now(dt.UTC).timestamp() * 1000))), HttpTransport._send
        waiting: list[asyncio.Task[JobFinished]] = []

        async def lost(self: HttpTransport, *given: Any, **options: Any) -> None:
            waiting.append(asyncio.create_task(client.result(job_id, 60)))
            await send(self, *given, **options)
            raise UnavailableError("the answer is lost")

        with mock.patch.object(HttpTransport, "_send", lost), pytest.raises(UnavailableError):
            await client.submit(left=ROWS, right=ROWS, job_id=job_id)
        await _finish(platform, tenant.id, job_id)
        assert (await waiting[0]).matches == 7


async def test_a_transport_that_is_started_again_looks_up_what_it_did_not_follow(
    platform: Platform, gateway_url: str
) -> None:
    async with keyed(platform, gateway_url) as tenant:
        client = SettlerClient(HttpTransport(gateway_url, tenant.key), tenant.id)
        async with client:
            job = await client.submit(left=ROWS, right=ROWS)
        await _finish(platform, tenant.id, job.id)
        async with client:
            again = await client.submit(left=ROWS, right=ROWS, job_id=job.id)
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
        with pytest.raises(InvalidRequestError, match="counted by the platform"):
            await client.record_usage(Resource.CUSTOM_DOMAINS, 10)
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


async def test_a_second_start_waits_until_results_are_followed_and_connects_if_the_first_is_cancelled() -> None:
    begun, go, followers = asyncio.Event(), asyncio.Event(), list[asyncio.Task[None] | None]()

    async def held(_self: HttpTransport, following: asyncio.Event) -> None:
        followers.append(asyncio.current_task())
        begun.set()
        await go.wait()
        following.set()
        await asyncio.Event().wait()

    transport = HttpTransport("http://127.0.0.1:1", f"sk_{uuid7(1)}_secret")
    with mock.patch.object(HttpTransport, "_follow", held):
        first = asyncio.create_task(transport.start())
        await begun.wait()
        second = asyncio.create_task(transport.start())
        done, _ = await asyncio.wait([second], timeout=0.1)
        assert not done, "nothing is followed yet"
        first.cancel()
        go.set()
        await asyncio.wait([first, second])
    assert first.cancelled()
    assert [follower.done() for follower in followers if follower] == [True, False]
    await transport.stop()
    assert [follower.done() for follower in followers if follower] == [True, True]
    with pytest.raises(UnavailableError, match="not started"):
        transport._started()
