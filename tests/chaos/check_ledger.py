"""Nothing lost, doubled, turned or crossed: requests against decisions, places, results and dead letters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from tests.chaos.findings import Findings, repeated
from tests.chaos.load import Sent
from tests.chaos.murmur import partition_of
from tests.chaos.recording import Entry, Recording

REQUESTED, DECIDED = "settler.job.requested.v1", "settler.job.decided.v1"
ENQUEUED, DISPATCHED = "settler.pool.jobs-enqueued.v1", "settler.job.dispatched.v1"
FINISHED = "settler.job.finished.v1"
READERS = {
    "job-requests": ("admission",),
    "usage-events": ("admission", "noisy-neighbour"),
    "flag-commands": ("flags",),
}
"""The folds that read what producers write: each refuses a bad record for itself."""
TICK = "settler.clock.tick.v1"
FOLD_ROLES = ("admission", "scheduler", "noisy-neighbour", "noisy-detector", "flags")
KEYED = ("job-decisions", "job-results", "tenant-signals", "flag-changes", "tenant-changes")
"""Topics whose writers must put each record under its root tenant."""


def check_ledger(recording: Recording, ledger: Mapping[int, Sent], findings: Findings) -> None:
    """Every claim about single records."""
    requests = _first_requests(recording)
    decisions = {e.data["job_id"]: e for e in recording.of_type("job-decisions", DECIDED)}
    admitted = {job for job, e in decisions.items() if e.data["admitted"]}
    _decisions(recording, requests, decisions, findings)
    _places(recording, decisions, admitted, requests, findings)
    _results(recording, decisions, admitted, findings)
    _dead_letters(recording, findings)
    _sent(recording, ledger, findings)
    _outputs(recording, findings)
    _homes(recording, findings)
    _flags(recording, findings)


def is_home(entry: Entry, partitions: int) -> bool:
    """Whether the record lies where its key belongs."""
    return entry.key is not None and partition_of(entry.key, partitions) == entry.partition


def _first_requests(recording: Recording) -> dict[str, Entry]:
    """The requests to be decided on, each id once, in log order."""
    found: dict[str, Entry] = {}
    count = recording.partitions["job-requests"]
    for entry in recording.of_type("job-requests", REQUESTED):
        if not entry.poison and is_home(entry, count):
            found.setdefault(entry.event["id"], entry)
    return found


def _decisions(
    recording: Recording, requests: Mapping[str, Entry], decisions: Mapping[str, Entry], findings: Findings
) -> None:
    decided = [e.data["job_id"] for e in recording.of_type("job-decisions", DECIDED)]
    findings.figures |= {"requests": len(requests), "decisions": len(decided)}
    findings.claim("lost", "requests without a decision", requests.keys() - decisions.keys())
    findings.claim("doubled", "decisions without a request", decisions.keys() - requests.keys())
    findings.claim("doubled", "jobs decided twice", repeated(decided))
    foreign = [job for job, e in decisions.items() if job in requests and e.tenant != requests[job].tenant]
    findings.claim("crossing", "decisions under another tenant", foreign)
    wanted: dict[int, list[str]] = defaultdict(list)
    for job, entry in requests.items():
        wanted[entry.partition].append(job)
    for partition, entries in recording.logs["job-decisions"].items():
        present = {e.data["job_id"] for e in entries}
        inputs = [job for job in wanted[partition] if job in present]
        outputs = list(dict.fromkeys(e.data["job_id"] for e in entries if e.data["job_id"] in requests))
        inversions = [a for a, b in zip(inputs, outputs, strict=False) if a != b]
        findings.claim("order", f"decisions out of order in partition {partition}", inversions[:1])


def _places(
    recording: Recording, decisions: Mapping[str, Entry], admitted: set[str], requests: Mapping[str, Entry],
    findings: Findings,
) -> None:  # fmt: skip
    """Each admitted job has one place in the pool, in the order of its tenant's decisions."""
    places = [(entry, job) for entry in recording.of_type("pool-inputs", ENQUEUED) for job in entry.data["jobs"]]
    jobs = [job["job_id"] for _, job in places]
    findings.claim("lost", "admitted jobs without a place in the pool", admitted - set(jobs))
    findings.claim("doubled", "places of jobs that were not admitted", set(jobs) - admitted)
    findings.claim("doubled", "jobs with two places", repeated(jobs))
    foreign = [e.where for e, job in places if (d := decisions.get(job["job_id"])) and e.tenant != d.tenant]
    findings.claim("crossing", "places under another tenant", foreign)
    astray = []
    for entry, job in places:
        request = requests.get(job["job_id"])
        place = (entry.data["topic"], entry.data["partition"], job["offset"])
        if request is not None and place != (request.topic, request.partition, request.offset):
            astray.append(entry.where)
    findings.claim("crossing", "places that point to another request", astray)
    by_tenant: dict[str, list[str]] = defaultdict(list)
    for entry, job in places:
        by_tenant[entry.tenant].append(job["job_id"])
    order: dict[str, list[str]] = defaultdict(list)
    for entry in recording.of_type("job-decisions", DECIDED):
        if entry.data["admitted"]:
            order[entry.tenant].append(entry.data["job_id"])
    turned = [one for one in order if _common(order[one], by_tenant[one]) != _common(by_tenant[one], order[one])]
    findings.claim("order", "tenants whose jobs enter the pool in another order", turned)


def _common(jobs: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return list(dict.fromkeys(job for job in jobs if job in known))


def _results(recording: Recording, decisions: Mapping[str, Entry], admitted: set[str], findings: Findings) -> None:
    attempts = [(e.data["job_id"], e.data["attempt"]) for e in recording.of_type("job-dispatches", DISPATCHED)]
    findings.claim("doubled", "attempts dispatched twice", repeated(attempts))
    findings.claim("doubled", "dispatches of jobs that were not admitted", {job for job, _ in attempts} - admitted)
    results = list(recording.of_type("job-results", FINISHED))
    jobs = [e.data["job_id"] for e in results]
    findings.figures |= {"admitted": len(admitted), "results": len(jobs), "attempts": len(attempts)}
    for (status, reason), count in Counter((e.data["status"], e.data.get("reason")) for e in results).items():
        findings.figures[f"results {status}: {reason}" if reason else f"results {status}"] = count
    findings.claim("lost", "admitted jobs without a result", admitted - set(jobs))
    findings.claim("doubled", "results of jobs that were not admitted", set(jobs) - admitted)
    findings.claim("doubled", "jobs with two results", repeated(jobs))
    foreign = [e.where for e in results if (d := decisions.get(e.data["job_id"])) and e.tenant != d.tenant]
    findings.claim("crossing", "results under another tenant", foreign)
    tried = Counter(job for job, _ in attempts)
    odd = [e.where for e in results if e.data["attempt"] > tried[e.data["job_id"]]]
    findings.claim("doubled", "results of attempts that were never dispatched", odd)


def _dead_letters(recording: Recording, findings: Findings) -> None:
    """Each bad record is refused once by each fold that reads it; nothing good is refused by anyone."""
    wanted: dict[tuple[str, str, int, int], Entry] = {}
    for topic, roles in READERS.items():
        for entry in recording.entries(topic):
            if entry.poison:
                wanted |= {(role, topic, entry.partition, entry.offset): entry for role in roles}
    found: dict[tuple[str, str, int, int], Entry] = {}
    places = []
    for letter in recording.entries("dead-letters"):
        said = letter.headers
        topic = said["dl-topic"].decode().removeprefix(f"{recording.deployment}.")
        place = (said["dl-role"].decode(), topic, int(said["dl-partition"]), int(said["dl-offset"]))
        found[place] = letter
        if place[0] in FOLD_ROLES:
            places.append(place)
    findings.figures["dead letters"] = len(places)
    findings.claim("lost", "bad records without a dead letter", wanted.keys() - found.keys())
    findings.claim("doubled", "dead letters of good records", found.keys() - wanted.keys())
    findings.claim("doubled", "records with two dead letters of one fold", repeated(places))
    changed = [
        e.where for place, e in wanted.items()
        if place in found and ((e.value or b""), e.key) != (found[place].value, found[place].headers.get("dl-key"))
    ]  # fmt: skip
    findings.claim("lost", "dead letters that are not their record", changed)


def _sent(recording: Recording, ledger: Mapping[int, Sent], findings: Findings) -> None:
    """What the broker has acknowledged is in its log, once; what lay in a wrong partition was moved, once."""
    times: Counter[int] = Counter()
    home: Counter[int] = Counter()
    for topic in READERS:
        for entry in recording.entries(topic):
            if "chaos-number" in entry.headers:
                number = int(entry.headers["chaos-number"])
                times[number] += 1
                home[number] += is_home(entry, recording.partitions[topic])
    findings.figures["records sent"] = len(ledger)
    findings.figures["records acknowledged"] = sum(sent.stored is True for sent in ledger.values())
    missing = [number for number, sent in ledger.items() if sent.stored and not times[number]]
    findings.claim("lost", "acknowledged records that are not in the log", missing)
    straight = [n for n, sent in ledger.items() if sent.kind != "misplaced" and times[n] > 1]
    findings.claim("doubled", "records that a producer sent once and are in the log twice", straight)
    moved = [n for n, sent in ledger.items() if sent.kind == "misplaced" and times[n] and (home[n], times[n]) != (1, 2)]
    findings.claim("lost", "records of a wrong partition that were not moved home exactly once", moved)


def _outputs(recording: Recording, findings: Findings) -> None:
    """What each fold's journal says that it has published is what the topics hold of it, and no id is there twice."""
    written: Counter[str] = Counter()
    for topic, log in recording.logs.items():
        if topic.endswith(("-changelog", "-journal")) or topic in READERS or topic == "dead-letters":
            continue
        ids = []
        for entries in log.values():
            for entry in entries:
                if entry.type == TICK:  # one event for all partitions
                    continue
                source = entry.event["source"]
                ids.append((source, entry.event["id"]))
                if source.startswith(f"/{recording.deployment}/"):
                    written[source.rsplit("/", 1)[1]] += 1
        if topic != "tenant-changes":  # the outbox publishes at least once, and the folds compare versions
            findings.claim("doubled", f"ids twice in {topic}", repeated(ids))
    for role in FOLD_ROLES:
        said = sum(e.data["outputs"] for e in recording.entries(f"{role}-journal"))
        findings.equal("doubled" if written[role] > said else "lost", f"outputs of {role}", written[role], said)


def _homes(recording: Recording, findings: Findings) -> None:
    """Every record of ours lies in the partition of its key."""
    astray = [
        e.where for topic in KEYED for e in recording.entries(topic) if not is_home(e, recording.partitions[topic])
    ]
    findings.claim("crossing", "records outside of their tenant's partition", astray)
    roots = {e.tenant: e.data["root_id"] for e in recording.of_type("tenant-changes", "settler.tenant.changed.v1")}
    foreign = [
        e.where for topic in KEYED for e in recording.entries(topic)
        if e.tenant in roots and (e.key or b"").decode() != roots[e.tenant]
    ]  # fmt: skip
    findings.claim("crossing", "records under another tenant's key", foreign)


def _flags(recording: Recording, findings: Findings) -> None:
    """Each flag command leads to one change; versions of a setting count up by one."""
    commands = {e.event["id"]: e for e in recording.of_type("flag-commands", "settler.flag.command.v1") if not e.poison}
    changes = list(recording.entries("flag-changes"))
    findings.figures["flag changes"] = len(changes)
    findings.equal("lost" if len(changes) < len(commands) else "doubled", "flag changes", len(changes), len(commands))
    versions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in changes:
        versions[entry.tenant, entry.data["flag"]].append(entry.data["version"])
    gaps = [key for key, seen in versions.items() if seen != list(range(1, len(seen) + 1))]
    findings.claim("counters", "flags whose versions do not count up by one", gaps)
