"""Mutants of a worker: the product with one planted bug, as it could be written by somebody who has not understood it.

Each is run under a short round of kills, and the checker has to find what it has done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.chaos.fail_points import around

STALE_RECORDS = 3
"""How far back a session of the stale mutant begins."""
UNLIMITED = 2**60
"""A limit that no tenant reaches."""


def plant(name: str) -> None:
    """Be this mutant from now on."""
    PLANTS[name]()


def _sends_not_awaited() -> None:
    """The step commits without having awaited what it has sent: aiokafka then commits what was refused."""
    from settler_streams.runtime.outputs import Outputs

    async def send_all(outputs: Any) -> None:
        for (topic, partition), batches in outputs._batches.items():
            for batch in batches:
                batch.close()
                sent = await outputs._producer.send_batch(batch, topic, partition=partition)
                sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    Outputs.send_all = send_all


def _faust_commit() -> None:
    """Faust's own way: outputs without a transaction, offsets by the consumer, and neither waits for the other."""
    import aiokafka
    from faust.types import TP

    from settler_streams.runtime import session, transport

    async def nothing(*_args: Any) -> None:
        return None

    async def open_producer(self: Any) -> None:
        self.producer = aiokafka.AIOKafkaProducer(
            bootstrap_servers=self.spec.cluster.servers, client_id=self.id.transactional_id, acks="all"
        )
        for name in ("begin_transaction", "commit_transaction", "abort_transaction", "send_offsets_to_transaction"):
            setattr(self.producer, name, nothing)
        await self.producer.start()

    async def add_offsets(self: Any, positions: Any) -> None:
        await self.faust._thread.commit({TP(*tp): offset for tp, offset in positions.items()})

    async def read_positions(self: Any, _stored: Any, committed: Any) -> None:
        beginnings, _ = await self._reader.bounds()
        self.positions |= {**beginnings, **committed}

    def assign(original: Any) -> Any:
        async def method(consumer: Any, assigned: Any) -> None:
            await original(consumer, assigned)
            for runner in consumer._runners.values():
                runner.session.faust = consumer

        return method

    _sends_not_awaited()
    session.Session._open_producer = open_producer
    session.Session.add_offsets = add_offsets
    session.Session._read_positions = read_positions
    around(transport.Consumer, "assign_folds", assign)


def _survives(before: Callable[[Any], None]) -> None:
    """A session that goes on after a step has failed, as if nothing had been."""
    from settler_streams.runtime.step import Step

    async def leave(step: Any, _kind: Any, error: Any, _trace: Any) -> bool:
        if error is not None:
            raise error
        try:
            await step._commit()
        except Exception as failure:  # noqa: BLE001 - that is the bug
            await step._abort(failure)
            before(step)
            step._session.lost = False
        return True

    Step.__aexit__ = leave


def _abort_swallowed() -> None:
    """A failed step is logged, and the next one begins behind it."""
    _survives(lambda _step: None)


def _merged_before_commit() -> None:
    """State becomes true before the transaction does; a step that failed is done again on top of it."""
    from settler_streams.runtime.runner import FoldRunner
    from settler_streams.runtime.state import Overlay

    def discard(overlay: Any) -> None:
        overlay.merge()

    def again(step: Any) -> None:
        step._session.again = True

    def process(original: Any) -> Any:
        async def method(runner: Any, records: Any) -> None:
            await original(runner, records)
            if getattr(runner.session, "again", False):
                runner.session.again = False
                await method(runner, records)

        return method

    Overlay.discard = discard
    _survives(again)
    around(FoldRunner, "_process", process)


def _unfenced() -> None:
    """Every process has a transactional id of its own, so that nobody fences anybody."""
    from settler_streams.runtime.session import FoldId

    def transactional_id(fold: Any) -> str:
        return f"{fold.deployment}.{fold.role}-{fold.partition}.{os.getpid()}"

    FoldId.transactional_id = property(transactional_id)


def _stale_positions() -> None:
    """A session that begins a few records before where the last one ended."""
    from settler_streams.runtime.session import Session

    def wrap(original: Any) -> Any:
        async def method(session: Any, *args: Any) -> None:
            await original(session, *args)
            session.positions = {tp: max(0, offset - STALE_RECORDS) for tp, offset in session.positions.items()}

        return method

    around(Session, "_read_positions", wrap)


def _no_limits() -> None:
    """No number of jobs is too many."""
    import dataclasses

    from settler_streams.core.quotas import Limits

    def wrap(original: Any) -> Any:
        def of(*args: Any) -> Limits:
            return dataclasses.replace(original(*args), concurrent=UNLIMITED, monthly=UNLIMITED)

        return of

    around(Limits, "of", wrap)


def _every(nth: int, change: Callable[[list[Any], Any], list[Any]]) -> None:
    """Change what every ``nth`` decision publishes."""
    import msgspec

    from settler_streams.runtime.step import Step

    count = 0

    def wrap(original: Any) -> Any:
        def publish(step: Any, outcome: Any) -> None:
            nonlocal count
            if any(emit.topic == "job-decisions" for emit in outcome.emits):
                count += 1
                if count % nth == 0:
                    outcome = msgspec.structs.replace(outcome, emits=tuple(change(list(outcome.emits), step)))
            original(step, outcome)

        return publish

    around(Step, "publish", wrap)


def _drop() -> None:
    """Now and then a decision is not published."""
    _every(20, lambda emits, _step: emits[1:])


def _double() -> None:
    """Now and then a decision is published twice."""
    _every(20, lambda emits, _step: [emits[0], *emits])


def _reorder() -> None:
    """Now and then a decision waits for the next one."""
    held: list[Any] = []

    def change(emits: list[Any], _step: Any) -> list[Any]:
        late, held[:] = held[:], emits[:1]
        return [*emits[1:], *late]

    _every(2, change)


def _leak() -> None:
    """Now and then a decision is published under the tenant before."""
    import msgspec

    last: list[Any] = []

    def change(emits: list[Any], _step: Any) -> list[Any]:
        first = emits[0]
        other = next((tenant for tenant in last if tenant != first.tenant), first.tenant)
        last[:] = [first.tenant, *last][:10]
        return [msgspec.structs.replace(first, tenant=other), *emits[1:]]

    _every(5, change)


PLANTS: dict[str, Callable[[], None]] = {
    "sends-not-awaited": _sends_not_awaited,
    "faust-commit": _faust_commit,
    "abort-swallowed": _abort_swallowed,
    "merged-before-commit": _merged_before_commit,
    "unfenced": _unfenced,
    "stale-positions": _stale_positions,
    "no-limits": _no_limits,
    "drop": _drop,
    "double": _double,
    "reorder": _reorder,
    "leak": _leak,
}
WANTED: dict[str, set[str]] = {
    "sends-not-awaited": {"lost"},
    "faust-commit": {"lost", "doubled", "positions"},
    "abort-swallowed": {"lost", "positions"},
    "merged-before-commit": {"lost", "counters"},
    "unfenced": {"doubled", "positions"},
    "stale-positions": {"positions"},
    "no-limits": {"quotas"},
    "drop": {"lost"},
    "double": {"doubled"},
    "reorder": {"order"},
    "leak": {"crossing"},
}
"""Of which one at least has to break."""
