"""Jobs over HTTP, against admission, Kafka and Postgres as they are."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Awaitable, Callable
from unittest import mock

import httpx
import msgspec
import pytest

from settler_streams.adapters.postgres import erasures, projection
from settler_streams.adapters.postgres.effects import JobDecision, JobResult
from settler_streams.errors import UnavailableError
from settler_streams.events import (
    FlagScope,
    FlagState,
    JobDecided,
    JobFinished,
    JobStatus,
    QuotaType,
    TenantErased,
    TenantTier,
)
from settler_streams.gateway import jobs, results
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import ApiKeys, EventPublisher, Scope
from tests.gateway.gateways import JOB, Keyed, keyed
from tests.services_layer.platform import Platform

pytestmark = pytest.mark.services


async def test_a_valid_job_is_admitted(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        response = await tenant.http.post("/v1/jobs", json=JOB)
        assert response.status_code == 202, response.text
        body = response.json()
        assert body["status"] == "admitted"
        assert response.headers["location"] == f"/v1/jobs/{body['job_id']}"
        assert msgspec.convert(body["decision"], JobDecided).admitted
        shown = (await tenant.http.get(response.headers["location"])).json()
        assert shown["decision"] == body["decision"]


async def test_the_same_idempotency_key_is_the_same_job(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant, keyed(platform, gateway_url) as other:
        headers = {"Idempotency-Key": '"order 7"'.replace(" ", "-")}
        answers = await asyncio.gather(*(tenant.http.post("/v1/jobs", json=JOB, headers=headers) for _ in range(4)))
        again = await tenant.http.post("/v1/jobs", json=JOB, headers=headers)
        elsewhere = await other.http.post("/v1/jobs", json=JOB, headers=headers)
        assert {a.status_code for a in (*answers, again, elsewhere)} == {202}
        assert {a.json()["job_id"] for a in (*answers, again)} == {again.json()["job_id"]}
        assert again.json()["decision"] == answers[0].json()["decision"]
        assert elsewhere.json()["job_id"] != again.json()["job_id"]


async def test_a_repetition_hears_of_a_decision_that_comes_while_the_database_is_asked(
    platform: Platform, gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Admission says it once. Whoever has asked the database before, which did not know it yet, has to be told too."""
    async with keyed(platform, gateway_url) as tenant:
        headers = {"Idempotency-Key": '"order-8"'}
        first: list[httpx.Response] = []

        async def slow_and_ignorant(*_asked: object) -> None:
            monkeypatch.setattr(jobs, "_read", quick_and_ignorant)
            first.append(await tenant.http.post("/v1/jobs", json=JOB, headers=headers))

        async def quick_and_ignorant(*_asked: object) -> None:
            return None

        monkeypatch.setattr(jobs, "_read", slow_and_ignorant)
        second = await tenant.http.post("/v1/jobs", json=JOB, headers=headers)
        assert [answer.status_code for answer in (*first, second)] == [202, 202]
        assert second.json()["decision"] == first[0].json()["decision"]
        assert (first[0].json()["repeated"], second.json()["repeated"]) == (False, True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "JSON"),
        (b"[]", "body"),
        (msgspec.json.encode({**JOB, "priority": "urgent"}), "priority"),
        (msgspec.json.encode({**JOB, "left": {"source": "file", "path": "a"}}), "format"),
        (msgspec.json.encode({**JOB, "user_id": "NOT-A-UUID"}), "user_id"),
        (msgspec.json.encode({**JOB, "left": {"source": "inline", "rows": [{"a": "\0"}]}}), "rows"),
        (msgspec.json.encode({**JOB, "estimated_cost_us": 2**63}), "estimated_cost_us"),
        (msgspec.json.encode({**JOB, "rules": {"keys": ["amount"]}}), "rules.keys"),
    ],
)
async def test_a_broken_body_is_refused_by_name(platform: Platform, gateway_url: str, body: bytes, told: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        response = await tenant.http.post("/v1/jobs", content=body)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/problem+json"
        assert told in response.json()["detail"]


async def test_refusals_say_why(platform: Platform, gateway_url: str) -> None:
    """A quota is 429 with the policy and Retry-After, an unknown kind 422, a suspended tenant 403."""
    async with keyed(platform, gateway_url, quotas={QuotaType.CONCURRENT_JOBS: 1}) as tenant:
        assert (await tenant.http.post("/v1/jobs", json=JOB)).status_code == 202
        refused = await tenant.http.post("/v1/jobs", json=JOB)
        assert refused.status_code == 429
        assert refused.json()["type"].endswith("#quota-exceeded")
        assert refused.json()["violated-policies"] == ["concurrent_jobs"]
        assert int(refused.headers["retry-after"]) >= 1
        assert (await tenant.http.post("/v1/jobs", json={**JOB, "kind": "unheard-of"})).status_code == 422
        await platform.tenants.suspend(tenant.id)
        suspended = await tenant.http.post("/v1/jobs", json=JOB)
        assert suspended.status_code == 403
        assert (await tenant.http.get(f"/v1/jobs/{uuid.uuid4()}")).status_code == 404


async def test_the_job_rate_is_a_429_with_the_exact_wait(platform: Platform, gateway_url: str) -> None:
    quotas = {QuotaType.RATE_LIMIT: 2}
    async with keyed(platform, gateway_url, quotas=quotas) as tenant:
        answers = [await tenant.http.post("/v1/jobs", json=JOB) for _ in range(7)]
        refused = [a for a in answers if a.status_code == 429]
        assert refused, [a.status_code for a in answers]
        assert refused[0].json()["violated-policies"] == ["rate_limit"]
        assert 1 <= int(refused[0].headers["retry-after"]) <= 30


async def test_a_parents_suspension_is_a_403(platform: Platform, gateway_url: str) -> None:
    parent = (await platform.new_tenant()).tenant
    async with keyed(platform, gateway_url, parent_id=parent.id) as child:
        assert (await child.http.post("/v1/jobs", json=JOB)).status_code == 202
        await platform.tenants.suspend(parent.id)
        refused = await child.http.post("/v1/jobs", json=JOB)
        assert refused.status_code == 403, "by the gateway, or by admission when it heard first"
        assert (await child.http.get("/v1/flags/f")).status_code == 200, "reading goes on"


async def test_a_killed_flag_is_a_403(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        killed = FlagState(
            flag="jobs.reconciliation-preview", scope=FlagScope.TENANT, version=1, changed_at_ms=1, killed=True
        )
        await platform.publisher.publish("flag-state", tenant.id, tenant.id, killed)
        async with asyncio.timeout(60):
            while True:  # until admission has folded the setting, jobs of the kind are admitted
                refused = await tenant.http.post("/v1/jobs", json={**JOB, "kind": "reconciliation-preview"})
                if refused.status_code != 202:
                    break
        assert refused.status_code == 403
        assert refused.json()["decision"]["reason"] == "flag_disabled"
        async with asyncio.timeout(60):
            while True:  # the gateway follows the settings by itself, and may hear of this one after admission
                shown = (await tenant.http.get("/v1/flags/jobs.reconciliation-preview")).json()
                if shown["reason"] != "DEFAULT":
                    break
        assert (shown["enabled"], shown["reason"]) == (False, "KILLED")


async def _project(platform: Platform, *effects: JobDecision | JobResult) -> None:
    topic_id = str(uuid.uuid4())
    await projection.init_position(platform.pool, "test", topic_id, topic_id, 0)
    move = projection.PositionMove("test", topic_id, topic_id, 0, 0, 1)
    await projection.write_batch(platform.pool, move, [effects])


async def _finished_job(platform: Platform, tenant_id: TenantId, rows: int) -> str:
    job_id = uuid7(1_700_000_000_000)
    decided = JobDecision(
        tenant_id=tenant_id, job_id=job_id, kind="reconciliation", priority="normal", decision="admitted",
        requested_at_ms=1, decided_at_ms=2, source_version=1,
    )  # fmt: skip
    outcome = JobResult(
        tenant_id=tenant_id, job_id=job_id, outcome="succeeded", finished_at_ms=3, source_version=1, accepted_attempt=2
    )
    await _project(platform, decided, outcome)
    async with platform.pool.tenant(tenant_id) as tx:
        for attempt in (1, 2):
            await tx.execute(
                "INSERT INTO matches SELECT $1::uuid, $2::uuid, $3::int, n, 'exact', 'l' || n, ARRAY['r' || $3::int], "
                "'EUR', 'EUR', 5, 5, 0 FROM generate_series(1, $4::int) n",
                tenant_id, job_id, attempt, rows,
            )  # fmt: skip
        await tx.execute(
            "INSERT INTO unmatched VALUES ($1, $2, 2, 1, 'left', 26, 'l26', 'EUR', 5, '2026-01-31', 'no-partner')",
            tenant_id, job_id,
        )  # fmt: skip
        await tx.execute(
            "INSERT INTO reports VALUES ($1, $2, 2, 'EUR', $3, 26, 25, 1, 130, 125, 5, 25, 25, 0, 125, 125, 0)",
            tenant_id, job_id, rows,
        )  # fmt: skip
    return job_id


async def test_pages_show_the_accepted_attempt_alone_and_every_row_once(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant, keyed(platform, gateway_url) as other:
        job_id = await _finished_job(platform, tenant.id, rows=25)
        rows, cursor, pages = [], None, 0
        while pages == 0 or cursor is not None:
            parameters = {"limit": "10"} | ({"cursor": cursor} if cursor else {})
            page = (await tenant.http.get(f"/v1/jobs/{job_id}/matches", params=parameters)).json()
            rows += page["items"]
            cursor, pages = page.get("next_cursor"), pages + 1
        assert pages == 3
        assert [row["match_no"] for row in rows] == list(range(1, 26))
        assert {row["right_ids"][0] for row in rows} == {"r2"}
        (lone,) = (await tenant.http.get(f"/v1/jobs/{job_id}/unmatched")).json()["items"]
        assert (lone["record_date"], lone["amount_minor"]) == ("2026-01-31", 5)
        (total,) = (await tenant.http.get(f"/v1/jobs/{job_id}/report")).json()["items"]
        assert (total["matches"], total["left_unmatched_minor"]) == (25, 5)
        shown = (await tenant.http.get(f"/v1/jobs/{job_id}")).json()
        assert (shown["status"], shown["accepted_attempt"]) == ("succeeded", 2)
        for path in ("", "/matches", "/unmatched", "/report"):
            assert (await other.http.get(f"/v1/jobs/{job_id}{path}")).status_code == 404
        for wrong in ("0", "1001", "x", "-5", "9" * 40):
            answer = await tenant.http.get(f"/v1/jobs/{job_id}/matches", params={"limit": wrong})
            assert answer.status_code == 400


async def test_a_job_without_result_has_no_rows(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        job_id = uuid7(1_700_000_000_000)
        rejected = JobDecision(
            tenant_id=tenant.id, job_id=job_id, kind="reconciliation", priority="low", decision="rejected",
            requested_at_ms=1, decided_at_ms=2, source_version=1, reason="rate_limit", current_usage=6, limit_value=6,
            retry_after_ms=1500,
        )  # fmt: skip
        await _project(platform, rejected)
        assert (await tenant.http.get(f"/v1/jobs/{job_id}/report")).status_code == 409
        again = await tenant.http.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": job_id})
        assert again.status_code == 429, "a job that the database knows is not submitted again"
        assert again.headers["retry-after"] == "2"
        assert again.json()["decision"]["quota"] == "rate_limit"


async def _finish(platform: Platform, tenant_id: TenantId) -> str:
    """The id of a job whose result was just published."""
    job_id = uuid7(int(dt.datetime.now(dt.UTC).timestamp() * 1000))
    done = JobFinished(
        job_id=job_id, status=JobStatus.SUCCEEDED, attempt=1, kind="reconciliation",
        requested_at_ms=1, finished_at_ms=2, worker_us=3, matches=4,
    )  # fmt: skip
    await platform.publisher.publish("job-results", tenant_id, tenant_id, done)
    return job_id


async def test_results_stream_and_resume(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant, keyed(platform, gateway_url) as other:

        async def read(count: int, **headers: str) -> list[tuple[str, str]]:
            """The ids and job ids of the next ``count`` results."""
            found: list[tuple[str, str]] = []
            async with (
                asyncio.timeout(60),
                tenant.http.stream("GET", "/v1/results", params={"since": "beginning"}, headers=headers) as response,
            ):
                assert response.headers["content-type"].startswith("text/event-stream")
                event_id = ""
                async for line in response.aiter_lines():
                    if line.startswith("id: "):
                        event_id = line[4:]
                    elif line.startswith("data: "):
                        found.append((event_id, msgspec.json.decode(line[6:])["job_id"]))
                        if len(found) == count:
                            return found
            raise AssertionError("the stream ended")

        first = await _finish(platform, tenant.id)
        await _finish(platform, other.id)
        second = await _finish(platform, tenant.id)
        both = await read(2)
        assert [job_id for _, job_id in both] == [first, second]
        third = await _finish(platform, tenant.id)
        resumed = await read(2, **{"Last-Event-ID": both[0][0]})
        assert [job_id for _, job_id in resumed] == [second, third]
        wrong = await tenant.http.get("/v1/results", params={"since": "yesterday"})
        assert wrong.status_code == 400


async def test_an_oversize_body_is_413(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url, TenantTier.ENTERPRISE) as tenant:
        large = {**JOB, "left": {"source": "inline", "rows": [{"a": "x" * 1000}] * 1100}}
        assert (await tenant.http.post("/v1/jobs", json=large)).status_code == 413

        async def chunks() -> object:
            for _ in range(1200):
                yield b" " * 1024

        assert (await tenant.http.post("/v1/jobs", content=chunks())).status_code == 413  # type: ignore[arg-type]
        # Just below the bound: the event with its envelope no longer fits the topic.
        tight = msgspec.json.encode({**JOB, "kind": "reconciliation"})
        padded = tight[:-1] + b',"unknown":"' + b"x" * (1024 * 1024 - len(tight) - 14) + b'"}'
        assert (await tenant.http.post("/v1/jobs", content=padded)).status_code == 202


async def test_usage_and_cancel_are_stored(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        used = await tenant.http.post("/v1/usage", json={"resource": "storage_bytes", "quantity": 5})
        assert used.status_code == 202, used.text
        assert (await tenant.http.post("/v1/usage", json={"resource": "gold", "quantity": 5})).status_code == 400
        for quantity, status in ((2**53, 202), (-(2**53), 202), (2**53 + 1, 400), (-(2**63), 400)):
            used = await tenant.http.post("/v1/usage", json={"resource": "storage_bytes", "quantity": quantity})
            assert used.status_code == status, used.text
        job = (await tenant.http.post("/v1/jobs", json=JOB)).json()["job_id"]
        assert (await tenant.http.delete(f"/v1/jobs/{job}")).status_code == 202
        changed = await tenant.http.put("/v1/flags/new-feature", json={"rollout_per_mille": 5})
        assert changed.status_code == 202, changed.text
        for wrong in ({"rollout_per_mille": 1001}, {"scope": "global"}, {"user_id": "x"}):
            assert (await tenant.http.put("/v1/flags/new-feature", json=wrong)).status_code == 400
        assert (await tenant.http.put("/v1/flags/Not-A-Name", json={})).status_code == 400


async def test_domains_are_counted_by_nobody_but_the_platform(platform: Platform, gateway_url: str) -> None:
    async with keyed(platform, gateway_url) as tenant:
        publish = mock.AsyncMock(return_value=uuid7(1))
        with mock.patch.object(EventPublisher, "publish", publish):
            for quantity in (10**12, 1, -50):
                forged = {"resource": "custom_domains", "quantity": quantity}
                answer = await tenant.http.post("/v1/usage", json=forged)
                assert (answer.status_code, "counted by the platform" in answer.text) == (400, True), answer.text
            publish.assert_not_awaited()
            used = {"resource": "storage_bytes", "quantity": -50}
            assert (await tenant.http.post("/v1/usage", json=used)).status_code == 202
            publish.assert_awaited_once()


@pytest.mark.parametrize("key", ["order-42", "0190a1b2-0000-7000-8000-0000000000a1"])
async def test_a_key_that_is_used_for_usage_and_for_a_job_is_not_taken_for_a_repetition(
    platform: Platform, gateway_url: str, key: str
) -> None:
    async with keyed(platform, gateway_url) as tenant:
        headers = {"Idempotency-Key": key}
        used = {"resource": "storage_bytes", "quantity": 5}
        first, again = [await tenant.http.post("/v1/usage", json=used, headers=headers) for _ in range(2)]
        assert first.json() == again.json()
        job = (await tenant.http.post("/v1/jobs", json=JOB, headers=headers)).json()
        assert job["job_id"] != first.json()["event_id"]


async def test_an_open_stream_ends_when_its_tenant_is_erased_and_none_opens_any_more(
    platform: Platform, gateway_url: str
) -> None:
    async with keyed(platform, gateway_url) as tenant:
        async with asyncio.timeout(60), tenant.http.stream("GET", "/v1/results") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("id: ")
            deleted = await platform.tenants.delete(tenant.id, grace=dt.timedelta(0))
            await erasures.begin(platform.pool, tenant.id, "ann")
            event = TenantErased(version=deleted.version + 1, root_id=tenant.id)
            await platform.publisher.publish("tenant-changes", tenant.id, tenant.id, event)
            assert [line async for line in lines if line.startswith("data: ")] == [], "it ends, and tells nothing more"
        assert (await tenant.http.get("/v1/results")).status_code == 401


async def _key_id(platform: Platform, tenant: Keyed) -> str:
    return (await platform.tenants.authenticate(tenant.key)).key_id


async def _revoke(platform: Platform, tenant: Keyed) -> None:
    await platform.tenants.api_keys.revoke(tenant.id, await _key_id(platform, tenant))


async def _narrow(platform: Platform, tenant: Keyed) -> None:
    await platform.tenants.api_keys.change_scopes(tenant.id, await _key_id(platform, tenant), [Scope.FLAGS_READ])


async def _expire(platform: Platform, tenant: Keyed) -> None:
    async with platform.pool.tenant(tenant.id) as tx:
        await tx.execute("UPDATE api_keys SET expires_at = now() WHERE tenant_id = $1", tenant.id)


async def _delete(platform: Platform, tenant: Keyed) -> None:
    await platform.tenants.delete(tenant.id)


@pytest.mark.parametrize(("end", "status"), [(_revoke, 401), (_narrow, 403), (_expire, 401), (_delete, 401)])
async def test_an_open_stream_ends_with_what_its_key_may_do(
    platform: Platform,
    gateway_url: str,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[Platform, Keyed], Awaitable[None]],
    status: int,
) -> None:
    monkeypatch.setattr(results, "HEARTBEAT_S", 0.0)
    async with keyed(platform, gateway_url) as tenant:
        async with asyncio.timeout(60), tenant.http.stream("GET", "/v1/results") as response:
            lines = response.aiter_lines()
            assert (await anext(lines)).startswith("id: ")
            await end(platform, tenant)
            await _finish(platform, tenant.id)
            assert [line async for line in lines if line.startswith("data: ")] == [], "it ends, and tells nothing more"
        assert (await tenant.http.get("/v1/results")).status_code == status


async def test_a_deleted_tenants_stream_does_not_wait_for_the_next_look_at_its_key(
    platform: Platform, gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "HEARTBEAT_S", 3600.0)
    async with (
        keyed(platform, gateway_url) as tenant,
        asyncio.timeout(60),
        tenant.http.stream("GET", "/v1/results") as response,
    ):
        await platform.tenants.delete(tenant.id)
        assert [line async for line in response.aiter_lines() if line.startswith("data: ")] == [], "it ends"


async def test_an_open_stream_ends_when_its_key_cannot_be_looked_up(
    platform: Platform, gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "HEARTBEAT_S", 0.0)
    async with keyed(platform, gateway_url) as tenant, asyncio.timeout(60):
        with mock.patch.object(ApiKeys, "holds", mock.AsyncMock(side_effect=UnavailableError("away"))):
            assert (await tenant.http.get("/v1/results")).text.startswith("id: "), "it began, and ended"


async def test_an_open_stream_goes_on_while_its_key_may_read(
    platform: Platform, gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a suspended tenant, which may read."""
    monkeypatch.setattr(results, "HEARTBEAT_S", 0.0)
    async with (
        keyed(platform, gateway_url) as tenant,
        asyncio.timeout(60),
        tenant.http.stream("GET", "/v1/results") as response,
    ):
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("id: ")
        key_id = await _key_id(platform, tenant)
        await platform.tenants.api_keys.change_scopes(tenant.id, key_id, [Scope.JOBS_READ])
        await platform.tenants.suspend(tenant.id)
        job_id = await _finish(platform, tenant.id)
        assert job_id in await anext(line async for line in lines if line.startswith("data: "))
