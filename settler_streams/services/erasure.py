"""The erasure of a tenant: from the folds, the files, the cache and the database, with a record that stays.

::

    begin     the record; from here on no door opens for the tenant, and its grace is over for good
    folds     admission, the scheduler and the flags forget it, and say so
    letters   its dead letters are taken out of their topic
    records   what Kafka still holds of it is counted; it goes with each topic's retention
    files     its record sets
    cache     its keys in Valkey
    rows      every row of it, its schema, its slug, at last its own row
    check     all places are looked through once more
    end       the record says when

Each step can be repeated, and what is done is in the record: whoever is killed, at any point, is continued by the next
call. Several may erase the same tenant at a time.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from settler_streams.adapters import tenant_folder
from settler_streams.adapters.kafka import dead_letter_removal
from settler_streams.adapters.kafka.tenant_records import TenantRecords
from settler_streams.adapters.kafka.tenant_state import TenantState
from settler_streams.adapters.postgres import erasures
from settler_streams.adapters.postgres.erasures import Erasure
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.valkey.tenant_keys import TenantKeys
from settler_streams.errors import UnavailableError
from settler_streams.events import TenantErased, encode, envelope
from settler_streams.ids import TenantId, partition_of, uuid7
from settler_streams.services.audit import PLATFORM_ACTOR
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.erasure_answers import ErasureAnswers, Fold
from settler_streams.services.outbox_relay import OutboxRelay
from settler_streams.services.publisher import EventPublisher
from settler_streams.services.tenant_store import SOURCE
from settler_streams.settings import Settings
from settler_streams.topology import Topology, load_topology

__all__ = ["Erasure", "ErasureIncompleteError", "ErasureService"]

STATE_GONE_WITHIN_S = 120.0
"""Longest wait for the noisy-neighbour folds, whose windows end by themselves within a minute."""
STATE_PAUSE_S = 1.0
"""Between two looks at them: they move with ticks, once a second."""

Progress = Callable[[str], None]
"""Told what has just been done: a step, or a batch of a table."""


class ErasureIncompleteError(UnavailableError):
    """Something of the tenant was found after all steps; run it again, which repeats those that are concerned."""

    def __init__(self, tenant_id: TenantId, left: dict[str, str]) -> None:
        said = "; ".join(f"{step}: {what}" for step, what in left.items())
        super().__init__(f"something of tenant {tenant_id} is left, run it again: {said}")
        self.left = left


class ErasureService:
    """Erases tenants. Start ``relay`` and ``answers`` before it is used."""

    def __init__(
        self,
        settings: Settings,
        pool: TenantConnectionPool,
        relay: OutboxRelay,
        answers: ErasureAnswers,
        *,
        topology: Topology | None = None,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._relay = relay
        self._answers = answers
        self._topology = topology or load_topology()

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings) -> AsyncIterator[ErasureService]:
        """A service with connections of its own, for a process that has none yet.

        Raises:
            UnavailableError: Postgres or Kafka did not answer in time.
        """
        async with AsyncExitStack() as stack:
            pool = await TenantConnectionPool.open(settings)
            stack.push_async_callback(pool.close)
            publisher = EventPublisher(settings, source=SOURCE)
            relay, answers = OutboxRelay(pool, publisher), ErasureAnswers(settings)
            for part in (publisher, relay, answers):
                await part.start()
                stack.push_async_callback(part.stop)
            yield cls(settings, pool, relay, answers)

    async def get(self, tenant_id: TenantId) -> Erasure | None:
        """The record of a tenant's erasure; None when none has begun."""
        return await erasures.read(self._pool, tenant_id)

    async def unfinished(self, directory: TenantDirectory) -> list[TenantId]:
        """The tenants whose erasure has begun and not ended, of those that ``directory`` has heard of."""
        found = []
        for tenant_id in sorted({*directory, *directory.erased}):
            record = await self.get(tenant_id)
            if record is not None and record.ended_at is None:
                found.append(tenant_id)
        return found

    async def erase(
        self, tenant_id: TenantId, *, actor: str = PLATFORM_ACTOR, progress: Progress = lambda _done: None
    ) -> Erasure:
        """Erase a tenant, or go on where an erasure has stopped; of one that has ended, its record.

        Args:
            tenant_id: whom; deleted, past its grace period, and without children that are not erased.
            actor: who wants it.
            progress: told each step, and each batch of rows.

        Raises:
            ConflictError: the tenant is not deleted, its grace period is not over, or a child of it is not erased.
            ErasureIncompleteError: something was left; it is named.
            NotFoundError: there is no such tenant.
            UnavailableError: Postgres, Kafka or Valkey did not answer, or a fold; run it again.
        """
        erasure = await erasures.begin(self._pool, tenant_id, actor)
        progress("begin")
        steps = {
            "folds": self._forget_in_folds, "letters": self._take_letters_out, "records": self._count_records,
            "files": self._remove_files, "cache": self._empty_cache, "rows": self._delete_rows,
        }  # fmt: skip
        for step, work in steps.items():
            if erasure.ended_at is not None or step in erasure.steps:
                continue
            await work(erasure, progress)
            await erasures.step_done(self._pool, tenant_id, step)
            progress(step)
        erasure = await self._record(tenant_id)
        if erasure.ended_at is None:
            await self._check(erasure)
            progress("check")
            await erasures.end(self._pool, tenant_id)
            erasure = await self._record(tenant_id)
        return erasure

    async def _record(self, tenant_id: TenantId) -> Erasure:
        record = await self.get(tenant_id)
        assert record is not None, "a record of an erasure is never deleted"  # noqa: S101
        return record

    async def _forget_in_folds(self, erasure: Erasure, _progress: Progress) -> None:
        """1. Listen; 2. leave the event in the outbox; 3. wait for the answer of every fold that has to forget."""
        now = dt.datetime.now(dt.UTC)
        event = envelope(
            TenantErased(version=erasure.version, root_id=erasure.root_id),
            event_id=uuid7(int(now.timestamp() * 1000)), source=SOURCE, tenant=erasure.tenant_id, time=now,
            subject=erasure.tenant_id,
        )  # fmt: skip
        with self._answers.expect(erasure.tenant_id) as heard:
            if not await erasures.announce(self._pool, erasure, "folds", encode(event)):
                return
            self._relay.nudge()
            try:
                await heard.wait(erasure.version, self._folds(erasure.root_id))
            except UnavailableError:
                if "folds" not in (await self._record(erasure.tenant_id)).steps:
                    raise  # else another eraser has heard every answer, and deleted what we had asked

    def _folds(self, root_id: TenantId) -> set[Fold]:
        home = partition_of(root_id, self._topology.tenant_partitions)
        pools = range(self._topology.worker_pools)
        return {("admission", home), ("flags", home), *(("scheduler", pool) for pool in pools)}

    async def _take_letters_out(self, erasure: Erasure, _progress: Progress) -> None:
        taken_out = await dead_letter_removal.take_out(self._settings, self._topology, erasure.tenant_id)
        if taken_out:
            await erasures.add_count(self._pool, erasure.tenant_id, "dead-letters", taken_out)

    async def _count_records(self, erasure: Erasure, _progress: Progress) -> None:
        """Single records cannot be taken out of a topic: how many stay until its retention ends is in the record."""
        kept = [topic.name for topic in self._topology.topics if topic.cleanup == "delete"]
        counts: dict[str, int] = {}
        reader = TenantRecords(self._settings, self._topology, erasure.tenant_id, erasure.root_id)
        async with reader.opened() as records:
            for topic in records.topics():
                if topic in kept and (found := sum([1 async for _ in records.read(topic)])):
                    counts[f"topic/{topic}"] = found
        await erasures.note_counts(self._pool, erasure.tenant_id, counts)

    async def _remove_files(self, erasure: Erasure, _progress: Progress) -> None:
        folder = self._settings.record_sets_dir
        files = await asyncio.to_thread(tenant_folder.files_in, folder, erasure.tenant_id)
        if files:
            await erasures.note_counts(self._pool, erasure.tenant_id, {"files": files})
        await asyncio.to_thread(tenant_folder.remove, folder, erasure.tenant_id)

    async def _empty_cache(self, erasure: Erasure, _progress: Progress) -> None:
        async with self._keys() as keys:
            deleted = await keys.delete(erasure.tenant_id)
        if deleted:
            await erasures.add_count(self._pool, erasure.tenant_id, "cache", deleted)

    async def _delete_rows(self, erasure: Erasure, progress: Progress) -> None:
        await erasures.delete_rows(self._pool, erasure.tenant_id, lambda table, _rows: progress(f"rows/{table}"))

    async def _check(self, erasure: Erasure) -> None:
        """Look through every place again. The steps of those where something is found are to be repeated.

        Raises:
            ErasureIncompleteError: something is left.
        """
        left: dict[str, str] = {}
        if state := await self._state_left(erasure):
            left["folds"] = ", ".join(f"{topic} has {', '.join(keys[:3])}" for topic, keys in state.items())
        if letters := await dead_letter_removal.left_of(self._settings, self._topology, erasure.tenant_id):
            left["letters"] = f"{letters} dead letters"
        if await asyncio.to_thread(tenant_folder.is_there, self._settings.record_sets_dir, erasure.tenant_id):
            left["files"] = "its folder is there"
        async with self._keys() as keys:
            if found := await keys.find(erasure.tenant_id):
                left["cache"] = f"{len(found)} keys, such as {found[0].decode(errors='replace')}"
        if rows := await erasures.rows_left(self._pool, erasure.tenant_id):
            left["rows"] = ", ".join(f"{number} in {table}" for table, number in rows.items())
        for step in left:
            await erasures.step_undone(self._pool, erasure.tenant_id, step)
        if left:
            raise ErasureIncompleteError(erasure.tenant_id, left)

    async def _state_left(self, erasure: Erasure) -> dict[str, list[str]]:
        """What the compacted topics still say of the tenant, once the windows in which it was last seen have ended."""
        ends_s = time.monotonic() + STATE_GONE_WITHIN_S
        async with TenantState(self._settings, self._topology, erasure.tenant_id, erasure.root_id).opened() as state:
            while (found := await state.mentions()) and time.monotonic() < ends_s:  # noqa: ASYNC110 - folds tell nobody
                await asyncio.sleep(STATE_PAUSE_S)
            return found

    @asynccontextmanager
    async def _keys(self) -> AsyncIterator[TenantKeys]:
        keys = TenantKeys(self._settings)
        try:
            yield keys
        finally:
            await keys.close()
