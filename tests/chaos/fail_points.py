"""Fail points: named places in a worker's or executor's transaction at which it kills, or stops, itself.

The product has no hook for this. The methods that bound each place are wrapped here, in the process that is to fail;
a name that has moved fails at the start of that process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

STEP_POINTS = ("begun", "folded", "queued", "awaited", "offsets-added", "commit-sent", "committed", "merged")
"""Of a fold's step, in order; ``commit-sent`` is inside the commit, ``committed`` lies before the merge."""
STOP_POINTS = ("folded", "awaited", "offsets-added")
"""Of a step at which a process also stops, to wake up as a zombie with an open transaction."""
OPEN_POINTS = ("fenced", "loaded")
"""Of a takeover: the former owner is fenced; the state is loaded."""
ROW_POINTS = ("position-moved", "rows-projected", "rows-committed")
"""Of a projection's transaction in Postgres."""
REFUSED_POINTS = ("produce",)
"""Where the broker refuses an output: one batch of the step is replaced by a record larger than its topic takes."""
EXECUTOR_POINTS = ("results-written", "reported")
"""Of an executor's attempt."""
REFUSED_TOPICS = ("job-decisions", "job-results", "job-dispatches", "flag-changes", "usage-partials")
"""What is refused is an event: its loss would be seen."""
REFUSED_BYTES = 3 * 2**20
"""Beyond every topic's limit, and within what the producer sends."""
COMMIT_ON_ITS_WAY_S = 0.001
"""After this long the loop has handed the request to the kernel, which delivers it whatever becomes of the process."""


@dataclass(frozen=True)
class Arm:
    """What is to happen: at the ``nth`` time that ``role`` (any, if empty) comes by ``point``."""

    point: str
    role: str = ""
    nth: int = 1
    action: str = "kill"

    def text(self) -> str:
        """For an environment variable."""
        return f"{self.action}:{self.point}@{self.role}:{self.nth}"

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The opposite of :meth:`text`."""
        action, rest, nth = text.split(":")
        point, _, role = rest.partition("@")
        return cls(point, role, int(nth), action)


class Trigger:
    """Counts down to the armed place, notes that it was reached, then acts."""

    def __init__(self, arm: Arm, notes: Path, process: str) -> None:
        self.arm = arm
        self._left = arm.nth
        self._notes = notes
        self._process = process

    def pass_by(self, point: str, role: str) -> bool:
        """The process is at ``point``; answers whether it is to act, for an action that is not its own end."""
        if point != self.arm.point or (self.arm.role and role != self.arm.role):
            return False
        self._left -= 1
        if self._left != 0:
            return False
        self._note(role)
        if self.arm.action != "refuse":
            os.kill(os.getpid(), signal.SIGKILL if self.arm.action == "kill" else signal.SIGSTOP)
        return True

    def _note(self, role: str) -> None:
        """One line, written through before the process dies; the kernel keeps it."""
        said = {
            "at_s": time.time(), "process": self._process, "pid": os.getpid(),
            "action": self.arm.action, "point": self.arm.point, "role": role,
        }  # fmt: skip
        descriptor = os.open(self._notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(descriptor, json.dumps(said).encode() + b"\n")
        os.close(descriptor)


def around(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by what ``wrap`` makes of it."""
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(wrap(original)))


def install(trigger: Trigger) -> None:
    """Wrap every place of the armed kind."""
    point = trigger.arm.point
    if point in STEP_POINTS:
        _wrap_step(trigger)
    elif point in OPEN_POINTS:
        _wrap_takeover(trigger)
    elif point in ROW_POINTS:
        _wrap_rows(trigger)
    elif point in REFUSED_POINTS:
        _wrap_produce(trigger)
    elif point in EXECUTOR_POINTS:
        _wrap_executor(trigger)
    else:
        raise ValueError(f"no fail point {point!r}")


def _after(trigger: Trigger, point: str, role_of: Callable[..., str]) -> Callable[[Any], Any]:
    def wrap(original: Any) -> Any:
        async def method(*args: Any, **more: Any) -> Any:
            answer = await original(*args, **more)
            trigger.pass_by(point, role_of(*args))
            return answer

        return method

    return wrap


def role_of_producer(producer: Any) -> str:
    """A fold's producer calls itself by its transactional id: deployment, role and partition."""
    return _role_in(producer.client._client_id)


def _role_in(transactional_id: str) -> str:
    return transactional_id.partition(".")[2].rpartition("-")[0]


def _wrap_step(trigger: Trigger) -> None:
    import aiokafka
    from aiokafka.conn import AIOKafkaConnection

    from settler_streams.runtime.outputs import Outputs
    from settler_streams.runtime.session import Session
    from settler_streams.runtime.step import Step

    def of_step(step: Any, *_: Any) -> str:
        return str(step._session.id.role)

    def commit(original: Any) -> Any:
        async def method(step: Any) -> None:
            trigger.pass_by("folded", of_step(step))
            await original(step)
            trigger.pass_by("merged", of_step(step))

        return method

    def send_all(original: Any) -> Any:
        async def method(outputs: Any) -> None:
            producer = outputs._producer
            role = role_of_producer(producer)
            batches = sum(len(batches) for batches in outputs._batches.values())
            outputs._producer = _Queued(producer, batches, lambda: trigger.pass_by("queued", role))
            await original(outputs)
            trigger.pass_by("awaited", role)

        return method

    def send(original: Any) -> Any:
        def method(connection: Any, request: Any, *args: Any, **more: Any) -> Any:
            answer = original(connection, request, *args, **more)
            if type(request).__name__.startswith("EndTxn") and request._transaction_result:
                role = _role_in(connection._client_id)
                asyncio.get_running_loop().call_later(COMMIT_ON_ITS_WAY_S, trigger.pass_by, "commit-sent", role)
            return answer

        return method

    around(Step, "__aenter__", _after(trigger, "begun", of_step))
    around(Step, "_commit", commit)
    around(Outputs, "send_all", send_all)
    added = _after(trigger, "offsets-added", lambda producer, *_: role_of_producer(producer))
    around(aiokafka.AIOKafkaProducer, "send_offsets_to_transaction", added)
    around(AIOKafkaConnection, "send", send)
    around(Session, "commit", _after(trigger, "committed", lambda session, *_: session.id.role))


class _Queued:
    """A producer that says when the last batch of a step has been queued, before any is awaited."""

    def __init__(self, producer: Any, batches: int, queued: Callable[[], None]) -> None:
        self._producer = producer
        self._left = batches
        self._queued = queued

    async def send_batch(self, *args: Any, **more: Any) -> Any:
        future = await self._producer.send_batch(*args, **more)
        self._left -= 1
        if self._left == 0:
            self._queued()
        return future


def _wrap_takeover(trigger: Trigger) -> None:
    from settler_streams.runtime.session import Session

    around(Session, "_open_producer", _after(trigger, "fenced", lambda session: session.id.role))
    around(Session, "_load", _after(trigger, "loaded", lambda session: session.id.role))


def _wrap_produce(trigger: Trigger) -> None:
    from settler_streams.runtime.outputs import Outputs

    def send_all(original: Any) -> Any:
        async def method(outputs: Any) -> None:
            wanted = [place for place in outputs._batches if place[0].endswith(REFUSED_TOPICS)]
            if wanted and trigger.pass_by("produce", role_of_producer(outputs._producer)):
                fat = outputs._producer.create_batch()
                fat.append(timestamp=None, key=b"too large", value=b" " * REFUSED_BYTES, headers=[])
                outputs._batches[wanted[0]] = [fat]
            await original(outputs)

        return method

    around(Outputs, "send_all", send_all)


def _wrap_rows(trigger: Trigger) -> None:
    from settler_streams.adapters.postgres import projection as rows
    from settler_streams.runtime import projection

    around(rows, "_move_position", _after(trigger, "position-moved", lambda *_: "projection"))
    around(rows, "_project", _after(trigger, "rows-projected", lambda *_: "projection"))
    around(projection, "write_batch", _after(trigger, "rows-committed", lambda *_: "projection"))


def _wrap_executor(trigger: Trigger) -> None:
    from settler_streams.events import AttemptFinished
    from settler_streams.executor import process

    def report(original: Any) -> Any:
        async def method(executor: Any, body: Any, *args: Any) -> None:
            await original(executor, body, *args)
            if isinstance(body, AttemptFinished):
                trigger.pass_by("reported", "executor")

        return method

    around(process, "write_results", _after(trigger, "results-written", lambda *_: "executor"))
    around(process.Executor, "_report", report)
