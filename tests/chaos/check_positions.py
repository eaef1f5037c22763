"""Positions: every fold has read its inputs from the first record to the last, in unbroken runs that never go back."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping

import msgspec

from tests.chaos.check_ledger import TICK
from tests.chaos.findings import Findings
from tests.chaos.recording import Entry, Recording


def check_positions(
    recording: Recording, folds: Mapping[str, tuple[str, ...]], projections: Mapping[str, tuple[str, ...]],
    findings: Findings,
) -> None:  # fmt: skip
    """Journals, stored positions and Kafka's offsets of folds; positions in Postgres of projections."""
    steps = 0
    for role, inputs in folds.items():
        steps += sum(len(entries) for entries in recording.logs[f"{role}-journal"].values())
        for partition in recording.logs[f"{role}-journal"]:
            _fold(recording, role, partition, inputs, findings)
    findings.figures["steps"] = steps
    _samples(recording, findings)
    _projections(recording, projections, findings)


def _fold(recording: Recording, role: str, partition: int, inputs: tuple[str, ...], findings: Findings) -> None:
    name = f"{role}-{partition}"
    offsets = {topic: [e.offset for e in recording.logs[topic][partition]] for topic in inputs}
    stamps = {topic: [e.timestamp for e in recording.logs[topic][partition]] for topic in inputs}
    next_offset = dict.fromkeys(inputs, 0)
    now_ms = 0
    for step in recording.logs[f"{role}-journal"][partition]:
        for run in step.data["runs"]:
            topic = run["topic"].removeprefix(f"{recording.deployment}.")
            first, last, log = run["first"], run["last"], offsets[topic]
            if first < next_offset[topic]:
                findings.claim("positions", f"runs of {name} that go back", [f"{topic}@{first} in {step.where}"])
            skipped = log[bisect_left(log, next_offset[topic]) : bisect_left(log, first)]
            findings.claim("positions", f"records that {name} passed over in {topic}", skipped)
            place = slice(bisect_left(log, first), bisect_right(log, last))
            if len(log[place]) != run["records"]:
                findings.claim("positions", f"runs of {name} that do not hold what they say", [f"{topic}@{first}"])
            now_ms = max([now_ms, *stamps[topic][place]])
            next_offset[topic] = max(next_offset[topic], last + 1)
        if step.data["now_ms"] != now_ms:
            findings.claim("positions", f"steps of {name} at another time than their records'", [step.where])
            now_ms = step.data["now_ms"]
    for topic in inputs:
        behind = [e for e in recording.logs[topic][partition] if e.offset >= next_offset[topic]]
        left = [e.where for e in behind if e.type != TICK and not _is_empty_window(e)]
        findings.claim("lost", f"records that {name} has not read", left)
    _stored(recording, role, partition, {t: n for t, n in next_offset.items() if n}, findings)


def _is_empty_window(entry: Entry) -> bool:
    """What an idle partition says at the first tick of each window, and so until its worker stops."""
    return entry.type == "settler.usage.partial.v1" and not entry.data["sums"]


def _stored(recording: Recording, role: str, partition: int, journal: Mapping[str, int], findings: Findings) -> None:
    """State, Kafka and journal say the same."""
    clock = newest(recording.logs[f"{role}-changelog"][partition], b"clock/")
    if clock is None:
        findings.equal("positions", f"positions of {role}-{partition}, which stored none", dict(journal), {})
        return
    _, stored, _ = msgspec.msgpack.decode(clock[1:])
    known = {topic: offset for topic, offset in stored.items() if topic in journal}
    findings.equal("positions", f"positions in the state of {role}-{partition}", known, dict(journal))
    offsets = recording.committed[role]
    kafka = {topic: offsets.get((topic, partition)) for topic in journal}
    findings.equal("positions", f"Kafka's offsets of {role}-{partition}", kafka, dict(journal))


def newest(entries: list[Entry], key: bytes) -> bytes | None:
    """The last value of a changelog under ``key``."""
    return next((entry.value for entry in reversed(entries) if entry.key == key), None)


def _samples(recording: Recording, findings: Findings) -> None:
    findings.figures["position samples"] = len(recording.positions)
    back = defaultdict(list)
    for earlier, later in zip(recording.positions, recording.positions[1:], strict=False):
        for place, offset in earlier.items():
            if later.get(place, -1) < offset:
                back[place].append(f"{place}: {offset} then {later.get(place)}")
    findings.claim(
        "positions", "positions in Postgres that went back", [text for texts in back.values() for text in texts]
    )


def _projections(recording: Recording, projections: Mapping[str, tuple[str, ...]], findings: Findings) -> None:
    final = recording.positions[-1] if recording.positions else {}
    behind = []
    for role, inputs in projections.items():
        for topic in inputs:
            for partition, entries in recording.logs[topic].items():
                place = (f"{recording.deployment}.{role}", f"{recording.deployment}.{topic}", partition)
                wanted = entries[-1].offset + 1 if entries else 0
                if final.get(place, 0) != wanted:
                    behind.append(f"{role} {topic}-{partition}: {final.get(place)}, not {wanted}")
    findings.claim("positions", "projections that do not stand at the end of their input", behind)
