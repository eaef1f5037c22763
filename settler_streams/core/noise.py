"""Noisy neighbours, in two folds: each partition sums its tenants' usage, one detector judges all tenants together.

The partition fold keeps one value per tenant and window, and sends a window's sums on at every tick after which they
have changed; of each new window at its first tick, be there sums or none, so that an idle partition differs from one
that stands still. The detector takes the newest sums of each partition, and judges a window once all partitions are
past it. What is judged, and how, lies in :mod:`.neighbours`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import msgspec

from settler_streams.core.fold import NOTHING, Emit, FoldClock, FoldLogic, Outcome, Record, State, Value, value_of
from settler_streams.core.neighbours import RESOURCES, NoisePolicy, NoiseVerdict, Usage, Watch, Windows, step
from settler_streams.errors import RecordError
from settler_streams.events import (
    ClockTick,
    JobDecided,
    JobFinished,
    Resource,
    TenantNoisy,
    TenantQuiet,
    TenantSums,
    UsagePartial,
    UsageRecorded,
)
from settler_streams.ids import PLATFORM, TenantId, canonical_tenant

GRID = Windows(width_ms=2_000, kept=8, lateness_ms=2_000)
"""Windows of two seconds that may be corrected for two more: a verdict on three of five comes within ten seconds, or as
much later as a partition is late."""
POLICY = NoisePolicy(floors=(20, 2_000_000, 2 * 1_048_576))
"""Floors per window of two seconds: ten requests a second, one executor kept busy, 1 MiB/s."""
TICK_MS = 1_000
"""A partition sends a window's last sums with the tick after it; the detector waits that long before it judges."""
STANDSTILL_MS = 40_000
"""How long the detector waits for a partition that stands still, longer than a takeover takes (10 to 35 s). One that is
gone for good must not stop detection: from then on windows are judged that late, and without it."""
COUNT_MAX = 2**63 - 1
"""What an event can hold; a sum stops there, which is far beyond every floor and changes no verdict."""
CHUNK_TENANTS_MAX = 4_000
"""Tenants in one partial: about 600 kB of JSON, within the 1 MiB message limit."""


class WindowSum(Value, frozen=True, array_like=True):
    """One tenant's sums of one window."""

    root: TenantId
    requests: int = 0
    worker_us: int = 0
    storage_bytes: int = 0
    changed_in: int = 0
    """The round of partials that will tell this change."""


class Rounds(Value, frozen=True, array_like=True):
    """How many rounds of partials have been sent, and the newest window that was told."""

    sent: int
    told: int = -1


class NoisyNeighbour(FoldLogic):
    """One partition's sums; state keys are ``sum/<window>/<tenant>``, and ``rounds/``."""

    kinds: ClassVar[dict[str, type[Value]]] = {"clock": FoldClock, "sum": WindowSum, "rounds": Rounds}

    def __init__(self, state: State, partition: int) -> None:
        self._state = state
        self._partition = partition
        rounds = value_of(state, "rounds/", Rounds)
        self._round = rounds.sent if rounds else 0
        self._told = rounds.told if rounds else -1
        self._tenants: dict[int, dict[TenantId, None]] = {}
        self._unsent: set[int] = set()
        for key, value in state.items():
            if isinstance(value, WindowSum):
                _, window, tenant = key.split("/")
                self._tenants.setdefault(int(window), {})[TenantId(tenant)] = None
                if value.changed_in == self._round:
                    self._unsent.add(int(window))

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Count one record; see :class:`~settler_streams.core.fold.FoldLogic`."""
        match record.event.data:
            case JobDecided() as decided:
                return self._add(record, decided.decided_at_ms, now_ms, requests=1)
            case JobFinished() as finished:
                return self._add(record, finished.finished_at_ms, now_ms, worker_us=finished.worker_us)
            case UsageRecorded() as used if used.resource is Resource.STORAGE_BYTES:
                return self._add(record, record.event.time_ms, now_ms, storage_bytes=max(0, used.quantity))
            case UsageRecorded():
                return NOTHING
            case ClockTick():
                return self._tick(record, now_ms)
            case other:
                raise RecordError("misplaced", f"the noisy-neighbour fold has no use for {other.event_type}")

    def _add(self, record: Record, event_ms: int, now_ms: int, **amounts: int) -> Outcome:
        """Count an amount in its window: too late counts in the oldest open one, the future in the present one.

        A tick closes windows, and time alone does not: after a standstill one input is folded after another, and the
        first takes the clock to its end before the next begins.
        """
        tenant, root = record.event.tenantid, _root_of(record)
        oldest = GRID.open_from(max(self._told * GRID.width_ms, now_ms - STANDSTILL_MS))
        window = min(max(event_ms // GRID.width_ms, oldest), now_ms // GRID.width_ms)
        key = f"sum/{window}/{tenant}"
        before = value_of(self._state, key, WindowSum) or WindowSum(root)
        self._tenants.setdefault(window, {})[tenant] = None
        self._unsent.add(window)
        grown = {name: min(getattr(before, name) + amount, COUNT_MAX) for name, amount in amounts.items()}
        return Outcome({key: msgspec.structs.replace(before, changed_in=self._round, **grown)})

    def _tick(self, record: Record, now_ms: int) -> Outcome:
        """Send what has changed, oldest window first, and the present window once in any case: it says that no window
        which it closes will change any more."""
        if now_ms // GRID.width_ms > self._told:
            self._told = now_ms // GRID.width_ms
            self._unsent.add(self._told)
        emits = [emit for window in sorted(self._unsent) for emit in self._partials(window, record.offset)]
        changes: dict[str, Value | None] = {}
        if self._unsent:
            self._unsent.clear()
            self._round += 1
            changes["rounds/"] = Rounds(self._round, self._told)
        for window in [w for w in self._tenants if w <= now_ms // GRID.width_ms - GRID.kept]:
            changes.update(dict.fromkeys((f"sum/{window}/{tenant}" for tenant in self._tenants.pop(window)), None))
        return Outcome(changes, tuple(emits))

    def _partials(self, window: int, revision: int) -> Iterable[Emit]:
        tenants = sorted(self._tenants.get(window, ()))
        for chunk, start in enumerate(range(0, len(tenants) or 1, CHUNK_TENANTS_MAX)):
            sums = tuple(self._sum_of(window, tenant) for tenant in tenants[start : start + CHUNK_TENANTS_MAX])
            partial = UsagePartial(
                partition=self._partition,
                window_start_ms=window * GRID.width_ms,
                window_ms=GRID.width_ms,
                revision=revision,
                chunk=chunk,
                sums=sums,
            )
            # The revision, since a tick can be in the log twice.
            suffix = f"partial/{self._partition}/{window}/{revision}/{chunk}"
            yield Emit("usage-partials", partial, PLATFORM, str(self._partition), suffix, partition=0)

    def _sum_of(self, window: int, tenant: TenantId) -> TenantSums:
        value = value_of(self._state, f"sum/{window}/{tenant}", WindowSum)
        if value is None:
            raise AssertionError(f"no sum of {tenant} in window {window}")
        return TenantSums(
            tenant=tenant,
            root=value.root,
            requests=value.requests,
            worker_us=value.worker_us,
            storage_bytes=value.storage_bytes,
        )


def _root_of(record: Record) -> TenantId:
    """The key, if it can be a root: one that is none would spoil the partial of every tenant beside it."""
    try:
        return canonical_tenant(record.key)
    except ValueError as error:
        raise RecordError("foreign-tenant", f"the key {record.key[:100]!r} is no tenant") from error


class Partial(Value, frozen=True, array_like=True):
    """The newest sums of one chunk of one partition and window: tenant, root, and a number per resource."""

    revision: int
    sums: tuple[tuple[TenantId, TenantId, int, int, int], ...]


class TenantWatch(Value, frozen=True, array_like=True):
    """What is remembered of one tenant and resource, and since when it is noisy."""

    root: TenantId
    watch: Watch
    noisy_since_ms: int = 0


class Judged(Value, frozen=True, array_like=True):
    """The last window that was judged, and the newest one heard of each partition."""

    window: int
    heard: tuple[int, ...] = ()


class NoisyDetector(FoldLogic):
    """The one place that sees all tenants. State keys: ``partial/…``, ``watch/<resource>/<tenant>``, ``judged/``."""

    kinds: ClassVar[dict[str, type[Value]]] = {
        "clock": FoldClock,
        "partial": Partial,
        "watch": TenantWatch,
        "judged": Judged,
    }

    def __init__(self, state: State, partitions: int) -> None:
        self._state = state
        self._partials: dict[int, set[str]] = {}
        for key in state:
            if key.startswith("partial/"):
                self._partials.setdefault(int(key.split("/")[1]), set()).add(key)
        self._watched = {key for key in state if key.startswith("watch/")}
        judged = value_of(state, "judged/", Judged) or Judged(-1)
        self._judged = judged.window
        self._heard = [*judged.heard, *[-1] * partitions][:partitions]

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Take one partial, or judge what is due; see :class:`~settler_streams.core.fold.FoldLogic`."""
        match record.event.data:
            case UsagePartial() as partial:
                return self._merge(partial)
            case ClockTick():
                return self._judge_due(now_ms)
            case other:
                raise RecordError("misplaced", f"the noisy detector has no use for {other.event_type}")

    def _merge(self, partial: UsagePartial) -> Outcome:
        """Commutative and idempotent. What comes after its window was judged changes no verdict any more."""
        window = partial.window_start_ms // GRID.width_ms
        key = f"partial/{window}/{partial.partition}/{partial.chunk}"
        known = value_of(self._state, key, Partial)
        changes: dict[str, Value | None] = {}
        if partial.partition < len(self._heard) and self._heard[partial.partition] < window:
            self._heard[partial.partition] = window
            changes["judged/"] = Judged(self._judged, tuple(self._heard))
        # Nothing is stored of one without sums: it is the first of its window, and replaces none.
        if partial.sums and window > self._judged and (known is None or known.revision < partial.revision):
            self._partials.setdefault(window, set()).add(key)
            sums = tuple(
                (TenantId(s.tenant), TenantId(s.root), s.requests, s.worker_us, s.storage_bytes) for s in partial.sums
            )
            changes[key] = Partial(partial.revision, sums)
        return Outcome(changes) if changes else NOTHING

    def _last_closed(self, now_ms: int) -> int:
        """The newest window that no partition will change any more, or will not be waited for.

        A partition tells its windows in order, so whoever has told one has told all before it that are closed by then.
        """
        told_ms = min(self._heard) * GRID.width_ms
        return GRID.open_from(min(now_ms - TICK_MS, max(told_ms, now_ms - STANDSTILL_MS))) - 1

    def _judge_due(self, now_ms: int) -> Outcome:
        """Judge, oldest first, every window that can no longer change; one without usage is judged too."""
        last_closed = self._last_closed(now_ms)
        if last_closed <= self._judged:
            return NOTHING
        first = max(self._judged + 1, last_closed - STANDSTILL_MS // GRID.width_ms)
        watches = self._watches()
        roots = {tenant: value.root for (_, tenant), value in watches.items()}
        since = {key: value.noisy_since_ms for key, value in watches.items()}
        current = {key: value.watch for key, value in watches.items()}
        changes: dict[str, Value | None] = {"judged/": Judged(last_closed, tuple(self._heard))}
        emits: list[Emit] = []
        for window in range(first, last_closed + 1):
            usage = self._usage(window, roots)
            # Of this window alone, so that it does not matter how many are judged at a tick.
            tenants = len({tenant for _, tenant in current}.union(*usage.values()))
            current, verdicts = step(current, usage, tenants, POLICY)
            for verdict in verdicts:
                emits.append(_signal(verdict, window, tenants, roots, since))
                since[verdict.resource, verdict.tenant] = window * GRID.width_ms if verdict.noisy else 0
        for window in [w for w in self._partials if w <= last_closed]:
            changes.update(dict.fromkeys(self._partials.pop(window), None))
        self._judged = last_closed
        changes.update(self._store(current, roots, since))
        return Outcome(changes, tuple(emits))

    def _watches(self) -> dict[tuple[str, TenantId], TenantWatch]:
        watches: dict[tuple[str, TenantId], TenantWatch] = {}
        for key in sorted(self._watched):
            value = value_of(self._state, key, TenantWatch)
            if value is not None:
                _, resource, tenant = key.split("/")
                watches[resource, TenantId(tenant)] = value
        return watches

    def _usage(self, window: int, roots: dict[TenantId, TenantId]) -> Usage:
        """All tenants' sums of one window over all partitions; learns the roots of those seen."""
        usage: Usage = {resource: {} for resource in RESOURCES}
        for key in sorted(self._partials.get(window, ())):
            partial = value_of(self._state, key, Partial)
            for tenant, root, *amounts in partial.sums if partial is not None else ():
                roots[tenant] = root
                for resource, amount in zip(RESOURCES, amounts, strict=True):
                    usage[resource][tenant] = usage[resource].get(tenant, 0) + amount
        return usage

    def _store(
        self,
        current: Mapping[tuple[str, TenantId], Watch],
        roots: Mapping[TenantId, TenantId],
        since: Mapping[tuple[str, TenantId], int],
    ) -> dict[str, Value | None]:
        kept = {f"watch/{resource}/{tenant}": (resource, tenant) for resource, tenant in current}
        changes: dict[str, Value | None] = dict.fromkeys(self._watched - kept.keys(), None)
        for key, watched in kept.items():
            changes[key] = TenantWatch(roots[watched[1]], current[watched], since.get(watched, 0))
        self._watched = set(kept)
        return changes


def _signal(
    verdict: NoiseVerdict,
    window: int,
    tenants: int,
    roots: Mapping[TenantId, TenantId],
    since: Mapping[tuple[str, TenantId], int],
) -> Emit:
    start_ms = window * GRID.width_ms
    if verdict.noisy:
        body: TenantNoisy | TenantQuiet = TenantNoisy(
            resource=verdict.resource,
            window_start_ms=start_ms,
            window_ms=GRID.width_ms,
            used=min(verdict.usage, COUNT_MAX),
            others_average=min(verdict.others_average, COUNT_MAX),
            ratio_per_mille=None if verdict.ratio_per_mille is None else min(verdict.ratio_per_mille, COUNT_MAX),
            tenants=tenants,
        )
    else:
        began_ms = since.get((verdict.resource, verdict.tenant), 0)
        body = TenantQuiet(
            resource=verdict.resource, window_start_ms=start_ms, noisy_for_ms=max(0, start_ms - began_ms)
        )
    suffix = f"verdict/{verdict.tenant}/{verdict.resource}/{window}"
    return Emit("tenant-signals", body, verdict.tenant, roots[verdict.tenant], suffix, verdict.tenant)
