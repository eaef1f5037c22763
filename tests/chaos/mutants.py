"""Mutants of a recording: each plants one error that the system must never make, and the checker has to find it.

The record or row that is hurt is drawn by the seed, so that no error is found because of where it happened to be.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from tests.chaos import checker
from tests.chaos.check_ledger import DECIDED, DISPATCHED, ENQUEUED, FINISHED
from tests.chaos.load import Sent
from tests.chaos.recording import Entry, Recording

Mutant = Callable[[Recording, random.Random], Recording]


def try_all(
    recording: Recording, ledger: Mapping[int, Sent], told: Mapping[str, bool], seed: int, times: int = 1
) -> dict[str, set[str]]:
    """Plant each error ``times`` times; answers by which invariants it was found every time (none: it was missed)."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    recording = replace(recording, acknowledged=frozenset(n for n, sent in ledger.items() if sent.stored))
    caught = {}
    for name, (mutant, invariants) in MUTANTS.items():
        found = [checker.check(mutant(recording, chance), ledger, told).broken() for _ in range(times)]
        caught[name] = set.intersection(*found) & invariants
    return caught


def _with_log(recording: Recording, topic: str, partition: int, entries: list[Entry]) -> Recording:
    log = {**recording.logs[topic], partition: entries}
    return replace(recording, logs={**recording.logs, topic: log})


def _with_table(recording: Recording, table: str, rows: list[dict[str, Any]]) -> Recording:
    return replace(recording, tables={**recording.tables, table: rows})


def _copy(entry: Entry, event: dict[str, Any] | None = None, offset: int | None = None) -> Entry:
    value = entry.value if event is None else json.dumps(event).encode()
    place = entry.offset if offset is None else offset
    return Entry(entry.topic, entry.partition, place, entry.timestamp, entry.key, value, entry.headers)


def _any(recording: Recording, topic: str, event_type: str, chance: random.Random, **wanted: Any) -> Entry:
    """A record of this type whose body has these fields."""
    fits = [
        e
        for e in recording.of_type(topic, event_type)
        if all(e.data.get(name) in values for name, values in wanted.items())
    ]  # fmt: skip
    return chance.choice(fits)


def dropped(topic: str, event_type: str) -> Mutant:
    """A record is missing."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        victim = _any(recording, topic, event_type, chance)
        kept = [e for e in recording.logs[topic][victim.partition] if e is not victim]
        return _with_log(recording, topic, victim.partition, kept)

    return mutant


def doubled(topic: str, event_type: str) -> Mutant:
    """A record is there once more, at the end of its partition, as another event."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        victim = _any(recording, topic, event_type, chance)
        log = recording.logs[topic][victim.partition]
        again = _copy(victim, {**victim.event, "id": "00000000-0000-4000-8000-000000000000"}, log[-1].offset + 1)
        return _with_log(recording, topic, victim.partition, [*log, again])

    return mutant


def swapped(topic: str, event_type: str) -> Mutant:
    """Two neighbouring records of one root tenant have changed places."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        pairs = []
        for log in recording.logs[topic].values():
            places = [n for n, e in enumerate(log) if e.type == event_type]
            pairs += [(log, a, b) for a, b in itertools.pairwise(places) if log[a].key == log[b].key]
        log, a, b = chance.choice(pairs)
        turned = list(log)
        turned[a], turned[b] = _copy(log[b], offset=log[a].offset), _copy(log[a], offset=log[b].offset)
        return _with_log(recording, topic, log[a].partition, turned)

    return mutant


def altered(topic: str, event_type: str, change: Callable[[dict[str, Any], Recording], None], **wanted: Any) -> Mutant:
    """A record says something else."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        victim = _any(recording, topic, event_type, chance, **wanted)
        event = json.loads(victim.value or b"")
        change(event, recording)
        log = [_copy(e, event) if e is victim else e for e in recording.logs[topic][victim.partition]]
        return _with_log(recording, topic, victim.partition, log)

    return mutant


def _to_other_tenant(event: dict[str, Any], recording: Recording) -> None:
    event["tenantid"] = next(t["id"] for t in recording.tables["tenants"] if t["id"] != event["tenantid"])


def _admit(event: dict[str, Any], _recording: Recording) -> None:
    event["data"] |= {"admitted": True, "reason": None}


def _one_more(*path: str) -> Callable[[dict[str, Any], Recording], None]:
    def change(event: dict[str, Any], _recording: Recording) -> None:
        inner = event["data"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] += 1

    return change


def _letter(action: str) -> Mutant:
    def mutant(recording: Recording, chance: random.Random) -> Recording:
        victim = chance.choice([e for e in recording.entries("dead-letters") if e.headers["dl-role"] != b"executor"])
        log = recording.logs["dead-letters"][victim.partition]
        if action == "drop":
            return _with_log(recording, "dead-letters", victim.partition, [e for e in log if e is not victim])
        return _with_log(recording, "dead-letters", victim.partition, [*log, _copy(victim, offset=log[-1].offset + 1)])

    return mutant


def _request_lost(recording: Recording, chance: random.Random) -> Recording:
    """The broker has lost a record that it had acknowledged."""
    plain = [e for e in recording.entries("job-requests") if e.headers.get("chaos-kind") == b"plain"]
    victim = chance.choice([e for e in plain if int(e.headers["chaos-number"]) in recording.acknowledged])
    log = [e for e in recording.logs["job-requests"][victim.partition] if e is not victim]
    return _with_log(recording, "job-requests", victim.partition, log)


def _step(again: bool) -> Mutant:
    """A journal in which a step is missing, or comes a second time: positions that jumped, or went back."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        log = chance.choice([log for log in recording.logs["admission-journal"].values() if len(log) > 2])
        place = chance.randrange(1, len(log) - 1)
        changed = [*log, _copy(log[place], offset=log[-1].offset + 1)] if again else [*log[:place], *log[place + 1 :]]
        return _with_log(recording, "admission-journal", log[0].partition, changed)

    return mutant


def _stored_usage(recording: Recording, chance: random.Random) -> Recording:
    """A counter in the changelog is one too high."""
    newest = {
        (e.partition, e.key): e
        for e in recording.entries("admission-changelog")
        if (e.key or b"").startswith(b"usage/")
    }
    victim = chance.choice(list(newest.values()))
    stored = victim.value or b""
    fields = msgspec.msgpack.decode(stored[1:])
    fields[6] += 1
    entry = _copy(victim)
    entry.value = stored[:1] + msgspec.msgpack.encode(fields)
    log = [entry if e is victim else e for e in recording.logs["admission-changelog"][victim.partition]]
    return _with_log(recording, "admission-changelog", victim.partition, log)


def _end_not_stored(recording: Recording, chance: random.Random) -> Recording:
    """Jobs that have ended hold their slots still: the tombstone of their reservations is not in the changelog."""
    log_of = recording.logs["admission-changelog"]
    newest = {(e.partition, e.key): e for e in recording.entries("admission-changelog")}
    stored = {(e.partition, e.key) for e in recording.entries("admission-changelog") if e.value is not None}
    ended = [e for at, e in newest.items() if (e.key or b"").startswith(b"jobs/") and e.value is None and at in stored]
    victim = chance.choice(ended)
    kept = [e for e in log_of[victim.partition] if (e.key, e.value) != (victim.key, None)]
    return _with_log(recording, "admission-changelog", victim.partition, kept)


def _row(table: str, change: Callable[[dict[str, Any], Recording], dict[str, Any] | None]) -> Mutant:
    """A row is another, or is missing."""

    def mutant(recording: Recording, chance: random.Random) -> Recording:
        rows = list(recording.tables[table])
        place = chance.randrange(len(rows))
        changed = change(rows[place], recording)
        rows[place : place + 1] = [] if changed is None else [changed]
        return _with_table(recording, table, rows)

    return mutant


def _match_missing(recording: Recording, chance: random.Random) -> Recording:
    """Of an attempt that was accepted: of others there may be any number of rows, and none is seen."""
    accepted = {(e.data["job_id"], e.data["attempt"]) for e in recording.of_type("job-results", FINISHED)}
    rows = list(recording.tables["matches"])
    place = chance.choice([n for n, row in enumerate(rows) if (row["job_id"], row["attempt"]) in accepted])
    rows[place] = {**rows[place], "rows": rows[place]["rows"] - 1}
    return _with_table(recording, "matches", rows)


def _under_another(row: dict[str, Any], recording: Recording) -> dict[str, Any]:
    other = next(t["id"] for t in recording.tables["tenants"] if t["id"] != row["tenant_id"])
    return {**row, "tenant_id": other}


def _position_back(recording: Recording, chance: random.Random) -> Recording:
    samples = [dict(sample) for sample in recording.positions]
    place = chance.choice([place for place, offset in samples[-1].items() if offset > 1])
    samples.insert(len(samples) - 1, {**samples[-1], place: samples[-1][place] + 1})
    return replace(recording, positions=samples)


def _offset_behind(recording: Recording, chance: random.Random) -> Recording:
    role = chance.choice(["admission", "scheduler", "noisy-neighbour"])
    offsets = dict(recording.committed[role])
    place = chance.choice([place for place, offset in offsets.items() if offset > 0])
    offsets[place] -= 1
    return replace(recording, committed={**recording.committed, role: offsets})


def _foreign_row_seen(recording: Recording, chance: random.Random) -> Recording:
    tenant = chance.choice(list(recording.seen_by))
    shown, _ = recording.seen_by[tenant]["jobs"]
    return replace(
        recording, seen_by={**recording.seen_by, tenant: {**recording.seen_by[tenant], "jobs": (shown + 1, 1)}}
    )


def _window_off(recording: Recording, chance: random.Random) -> Recording:
    newest = {}
    for entry in recording.of_type("usage-partials", "settler.usage.partial.v1"):
        newest[entry.data["partition"], entry.data["window_start_ms"]] = entry
    victim = chance.choice([entry for entry in newest.values() if entry.data["sums"]])
    event = json.loads(victim.value or b"")
    event["data"]["sums"][0]["requests"] = event["data"]["sums"][0].get("requests", 0) + 1
    log = [_copy(e, event) if e is victim else e for e in recording.logs["usage-partials"][0]]
    return _with_log(recording, "usage-partials", 0, log)


LIMITS = ("concurrent_jobs", "monthly_reconciliations", "rate_limit")
MUTANTS: dict[str, tuple[Mutant, set[str]]] = {
    "a decision is dropped": (dropped("job-decisions", DECIDED), {"lost"}),
    "a decision is doubled": (doubled("job-decisions", DECIDED), {"doubled"}),
    "two decisions of a tenant are swapped": (swapped("job-decisions", DECIDED), {"order"}),
    "a decision leaks to another tenant": (altered("job-decisions", DECIDED, _to_other_tenant), {"crossing"}),
    "a job is admitted beyond a limit": (altered("job-decisions", DECIDED, _admit, reason=LIMITS), {"quotas"}),
    "a refusal says another use": (
        altered("job-decisions", DECIDED, _one_more("current"), reason=LIMITS[:2]), {"counters"},
    ),
    "a place in the pool is dropped": (dropped("pool-inputs", ENQUEUED), {"lost"}),
    "a place in the pool is doubled": (doubled("pool-inputs", ENQUEUED), {"doubled"}),
    "an attempt is dispatched twice": (doubled("job-dispatches", DISPATCHED), {"doubled"}),
    "a result is dropped": (dropped("job-results", FINISHED), {"lost"}),
    "a result is doubled": (doubled("job-results", FINISHED), {"doubled"}),
    "a result leaks to another tenant": (altered("job-results", FINISHED, _to_other_tenant), {"crossing"}),
    "a dead letter is dropped": (_letter("drop"), {"lost"}),
    "a dead letter is doubled": (_letter("double"), {"doubled"}),
    "a flag change is dropped": (dropped("flag-changes", "settler.flag.changed.v1"), {"lost"}),
    "a flag change is doubled": (doubled("flag-changes", "settler.flag.changed.v1"), {"doubled"}),
    "an acknowledged request is lost": (_request_lost, {"lost"}),
    "a step is missing in a journal": (_step(again=False), {"positions"}),
    "a step is read a second time": (_step(again=True), {"positions"}),
    "a usage report is one too high": (
        altered("tenant-signals", "settler.tenant.usage.v1", _one_more("used", "requests")), {"counters"},
    ),
    "a stored counter is one too high": (_stored_usage, {"counters"}),
    "a job's end is not stored": (_end_not_stored, {"counters"}),
    "a windowed sum is one too high": (_window_off, {"counters"}),
    "Kafka's offset is one behind": (_offset_behind, {"positions"}),
    "a position in Postgres goes back": (_position_back, {"positions"}),
    "a row of jobs is missing": (_row("jobs", lambda _row, _r: None), {"lost"}),
    "a row of jobs is another tenant's": (_row("jobs", _under_another), {"crossing"}),
    "a row of usage is one too high": (
        _row("tenant_usage", lambda row, _r: {**row, "quantity": row["quantity"] + 1}), {"counters"},
    ),
    "unmatched rows are another tenant's": (_row("unmatched", _under_another), {"crossing"}),
    "a match is missing": (_match_missing, {"rows"}),
    "a tenant sees another's row": (_foreign_row_seen, {"crossing"}),
}  # fmt: skip
"""By name: how it is planted, and the invariants of which one has to break."""
