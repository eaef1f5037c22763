"""Windowed sums: over all windows of a tenant they must add up to its decisions, its worker time and its storage."""

from __future__ import annotations

from collections import Counter

from tests.chaos.check_ledger import is_home
from tests.chaos.findings import Findings
from tests.chaos.recording import Entry, Recording


def check_noise(recording: Recording, findings: Findings) -> None:
    """The last word on each window, summed, against the events themselves.

    Only the events count that the fold has read before its last tick: what came after it is not told yet.
    """
    newest: dict[tuple[int, int, int], Entry] = {}
    for entry in recording.of_type("usage-partials", "settler.usage.partial.v1"):
        place = (entry.data["partition"], entry.data["window_start_ms"], entry.data.get("chunk", 0))
        if place not in newest or entry.data["revision"] >= newest[place].data["revision"]:
            newest[place] = entry
    told: Counter[tuple[str, str]] = Counter()
    for entry in newest.values():
        for sums in entry.data["sums"]:
            for resource in ("requests", "worker_us", "storage_bytes"):
                told[sums["tenant"], resource] += sums.get(resource, 0)
    wanted: Counter[tuple[str, str]] = Counter()
    for entry in recording.entries("job-decisions"):
        wanted[entry.tenant, "requests"] += 1
    for entry in recording.entries("job-results"):
        wanted[entry.tenant, "worker_us"] += entry.data["worker_us"]
    for entry in recording.entries("usage-events"):
        counted = not entry.poison and is_home(entry, recording.partitions["usage-events"])
        if counted and entry.data["resource"] == "storage_bytes":
            wanted[entry.tenant, "storage_bytes"] += max(0, entry.data["quantity"])
    findings.figures["windows"] = len(newest)
    wrong = [f"{k}: {told[k]}, not {wanted[k]}" for k in told.keys() | wanted.keys() if told[k] != wanted[k]]
    findings.claim("counters", "windowed sums that do not add up to the events", wrong)
