"""The HTTP transport, for tenants: everything through the gateway, with an API key.

The same promises as over Kafka. One event stream per transport tells its tenant's results, and resumes after a break.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from settler_streams.client.answers import Answers
from settler_streams.client.transport import Caller, Command, Start, answers_since, check_job_id
from settler_streams.errors import InvalidRequestError, NotFoundError, SettlerError, UnavailableError
from settler_streams.events import (
    FlagCommand,
    FlagScope,
    JobCancelRequested,
    JobDecided,
    JobFinished,
    JobRequested,
    UsageRecorded,
)
from settler_streams.ids import JobId, TenantId

ANSWER_DEADLINE_S = 35.0
"""Above the gateway's own deadline of 30 s, so that its answer comes before ours."""
STREAM_SILENCE_S = 30.0
"""The gateway sends something every 10 s; a stream that is silent for longer is broken."""
RECONNECTS_MAX = 20
"""Attempts in a row to resume a stream, about a minute in all; then whoever reads it is told."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 4.0
POLL_MIN_S, POLL_MAX_S = 0.1, 2.0
"""Pauses between questions about a job that another transport submitted, growing by half each time."""

_KEY = re.compile(r"sk_([0-9a-f-]{36})_.+")


@dataclass(frozen=True, slots=True)
class _Message:
    """One message of an event stream; ``id`` is where a later stream goes on, ``result`` what it carried."""

    id: str | None
    result: JobFinished | None


class HttpTransport:
    """Speaks for the tenant of ``api_key``, and for no other."""

    def __init__(self, base_url: str, api_key: str) -> None:
        match = _KEY.fullmatch(api_key)
        if match is None:
            raise InvalidRequestError("an API key reads sk_<tenant>_<secret>")
        self._tenant = TenantId(match[1])
        self._base_url = base_url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._turn = asyncio.Lock()
        self._users = 0
        self._client: httpx.AsyncClient | None = None
        self._follower: asyncio.Task[None] | None = None
        self._decisions: Answers[JobDecided] = Answers()
        self._results: Answers[JobFinished] = Answers()

    async def start(self) -> None:
        """Connect and begin to follow results; see :meth:`Transport.start`. It may be started again after an error."""
        async with self._turn:
            if self._users == 0:
                await self._connect()
            self._users += 1

    async def _connect(self) -> None:
        self._client = httpx.AsyncClient(base_url=self._base_url, headers=self._headers, timeout=ANSWER_DEADLINE_S)
        following = asyncio.Event()
        self._follower = asyncio.create_task(self._follow(following))
        try:
            await self._begin(following, self._follower)
        except BaseException:
            await self._disconnect()
            raise

    async def _begin(self, following: asyncio.Event, follower: asyncio.Task[None]) -> None:
        waiting = asyncio.create_task(following.wait())
        try:
            either = [waiting, follower]
            await asyncio.wait(either, timeout=ANSWER_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if following.is_set():
            return
        if follower.done():
            await follower  # its error says why
        raise UnavailableError(f"no event stream from {self._base_url} in {ANSWER_DEADLINE_S:.0f} s")

    async def stop(self) -> None:
        """Disconnect, when the last user stops; every accepted event is already stored."""
        async with self._turn:
            self._users -= 1
            if self._users == 0:
                await self._disconnect()

    async def _disconnect(self) -> None:
        if self._client is None:
            return
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        await self._client.aclose()
        self._client = self._follower = None
        self._decisions, self._results = Answers(), Answers()  # what comes meanwhile is not followed

    async def submit(self, caller: Caller, job_id: JobId, request: JobRequested) -> None:
        """See :meth:`Transport.submit`. The gateway's answer usually holds the decision already."""
        self._check_caller(caller)
        check_job_id(job_id)
        self._decisions.expect(self._tenant, job_id)
        first = self._results.expect(self._tenant, job_id)
        try:
            response = await self._send("POST", "/v1/jobs", request, idempotency_key=job_id)
            decision = _decision_in(response)
            if decision is None:
                _raise_for(response)
        except BaseException:
            self._decisions.forget(self._tenant, job_id)
            if first:
                self._results.forget(self._tenant, job_id)
            raise
        if decision is None:
            self._decisions.forget(self._tenant, job_id)  # nobody will tell; whoever asks looks it up
            return
        self._settle(decision)
        if first and decision.admitted and response.json().get("repeated"):
            self._results.forget(self._tenant, job_id)  # it may have finished before this transport began to follow

    async def send(self, caller: Caller, command: Command) -> None:
        """See :meth:`Transport.send`. The gateway names the API key as the actor of a flag command."""
        self._check_caller(caller)
        match command:
            case JobCancelRequested():
                response = await self._send("DELETE", f"/v1/jobs/{command.job_id}")
            case UsageRecorded():
                response = await self._send("POST", "/v1/usage", command, idempotency_key=str(uuid.uuid4()))
            case FlagCommand():
                if command.scope is FlagScope.GLOBAL:
                    raise InvalidRequestError("a tenant cannot change a global flag")
                body = msgspec.to_builtins(command)
                change = {name: body[name] for name in _FLAG_FIELDS if name in body}
                response = await self._send("PUT", f"/v1/flags/{command.flag}", change)
            case other:
                raise InvalidRequestError(f"the gateway has no use for {type(other).__name__}")
        _raise_for(response)

    async def decision(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobDecided:
        """See :meth:`Transport.decision`."""
        self._check_caller(caller)
        try:
            async with asyncio.timeout(timeout_s):
                if (future := self._decisions.find(self._tenant, job_id)) and (told := await asyncio.shield(future)):
                    return told
                return await self._look_decision_up(job_id)
        except TimeoutError as error:
            raise UnavailableError(f"no decision about job {job_id} in {timeout_s:.1f} s") from error

    async def result(self, caller: Caller, job_id: JobId, timeout_s: float) -> JobFinished:
        """See :meth:`Transport.result`."""
        self._check_caller(caller)
        self._check_follower()
        try:
            async with asyncio.timeout(timeout_s):
                if (future := self._results.find(self._tenant, job_id)) and (told := await asyncio.shield(future)):
                    return told
                return await self._look_result_up(caller, job_id)
        except TimeoutError as error:
            raise UnavailableError(f"no result of job {job_id} in {timeout_s:.1f} s") from error

    async def results(self, caller: Caller, start: Start) -> AsyncIterator[JobFinished]:
        """See :meth:`Transport.results`. A result may come twice after a broken connection.

        Raises:
            UnavailableError: the stream broke and could not be resumed.
        """
        self._check_caller(caller)
        async with contextlib.aclosing(self._stream(start)) as messages:
            async for message in messages:
                if message.result is not None:
                    yield message.result

    async def _follow(self, following: asyncio.Event) -> None:
        async with contextlib.aclosing(self._stream("now")) as messages:
            async for message in messages:
                following.set()  # the first message says that the stream has taken its position
                if message.result is not None:
                    self._results.settle(self._tenant, JobId(message.result.job_id), message.result)

    def _settle(self, decision: JobDecided) -> None:
        self._decisions.settle(self._tenant, JobId(decision.job_id), decision)
        if not decision.admitted:
            self._results.forget(self._tenant, JobId(decision.job_id))

    async def _look_decision_up(self, job_id: JobId) -> JobDecided:
        pause_s = POLL_MIN_S
        while True:
            response = await self._send("GET", f"/v1/jobs/{job_id}")
            decision = _decision_in(response)
            if decision is not None:
                self._settle(decision)
                return decision
            if response.status_code not in (200, 404, 429, 503):
                _raise_for(response)
            await asyncio.sleep(max(pause_s, float(response.headers.get("retry-after", 0))))
            pause_s = min(1.5 * pause_s, POLL_MAX_S)

    async def _look_result_up(self, caller: Caller, job_id: JobId) -> JobFinished:
        """Find the result of a job that this transport did not submit, from the time in its id on."""
        async for result in self.results(caller, answers_since(job_id)):
            if result.job_id == job_id:
                return result
        raise UnavailableError(f"the results ended before that of job {job_id}")

    async def _stream(self, start: Start) -> AsyncGenerator[_Message, None]:
        """The messages of the event stream, across reconnections."""
        last_id: str | None = None
        failures, pause_s = 0, RECONNECT_MIN_S
        while True:
            try:
                async for message in self._stream_once(start, last_id):
                    failures, pause_s = 0, RECONNECT_MIN_S
                    last_id = message.id or last_id
                    yield message
            except (httpx.TransportError, UnavailableError) as error:
                failures += 1
                if failures > RECONNECTS_MAX:
                    raise UnavailableError(f"the event stream cannot be resumed: {error!r}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)

    async def _stream_once(self, start: Start, last_id: str | None) -> AsyncGenerator[_Message, None]:
        parameters = {} if start == "now" else {"since": start if isinstance(start, str) else start.isoformat()}
        headers = {"Accept": "text/event-stream"} | ({} if last_id is None else {"Last-Event-ID": last_id})
        timeout = httpx.Timeout(ANSWER_DEADLINE_S, read=STREAM_SILENCE_S)
        client = self._started()
        async with client.stream("GET", "/v1/results", params=parameters, headers=headers, timeout=timeout) as response:
            if response.status_code != 200:
                await response.aread()
                _raise_for(response)
            event_id: str | None = None
            data = ""
            async for line in response.aiter_lines():
                if line.startswith("id:"):
                    event_id = line[3:].strip()
                elif line.startswith("data:"):
                    data += line[5:].strip()
                elif not line:
                    yield _Message(event_id, msgspec.json.decode(data, type=JobFinished) if data else None)
                    event_id, data = None, ""

    async def _send(
        self, method: str, path: str, body: Any = None, *, idempotency_key: str | None = None
    ) -> httpx.Response:
        headers = {} if idempotency_key is None else {"Idempotency-Key": idempotency_key}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = msgspec.json.encode(body)
        try:
            return await self._started().request(method, path, content=content, headers=headers)
        except httpx.TransportError as error:
            raise UnavailableError(f"it is unknown whether the gateway took {method} {path}: {error!r}") from error

    def _started(self) -> httpx.AsyncClient:
        if self._client is None:
            raise UnavailableError("the transport is not started")
        return self._client

    def _check_caller(self, caller: Caller) -> None:
        if caller.tenant != self._tenant:
            raise InvalidRequestError(f"the API key speaks for tenant {self._tenant}, not for {caller.tenant}")

    def _check_follower(self) -> None:
        if self._follower is not None and self._follower.done() and not self._follower.cancelled():
            raise UnavailableError(f"the event stream has ended: {self._follower.exception()!r}")


_FLAG_FIELDS = ("action", "enabled", "rollout_per_mille", "user_id", "salt", "reason")


def _decision_in(response: httpx.Response) -> JobDecided | None:
    """Admission's decision, in an answer or in the problem that a refusal is told by."""
    if "json" not in response.headers.get("content-type", ""):
        return None
    body = response.json()
    told = body.get("decision") if isinstance(body, dict) else None
    return None if told is None else msgspec.convert(told, JobDecided)


def _raise_for(response: httpx.Response) -> None:
    """Raise the error of ours that an answer of the gateway stands for."""
    status = response.status_code
    if status < 300:
        return
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200]
    kind: type[SettlerError] = InvalidRequestError
    if status == 404:
        kind = NotFoundError
    elif status == 429 or status >= 500:
        kind = UnavailableError
        detail += f"; try again in {response.headers.get('retry-after', '1')} s"
    raise kind(f"the gateway answered {status}: {detail}")
