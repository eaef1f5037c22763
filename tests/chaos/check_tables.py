"""Rows: the tables say what the topics say, each row under its own tenant, and no tenant sees another's."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.chaos.check_counters import USAGE
from tests.chaos.check_ledger import DECIDED, FINISHED
from tests.chaos.findings import Findings
from tests.chaos.recording import Entry, Recording, Row

QUOTA_USED = {
    "storage": "storage_bytes", "monthly_reconciliations": "reconciliations", "custom_domains": "custom_domains",
}  # fmt: skip
SIGNALS = {
    "settler.tenant.noisy.v1": "noisy",
    "settler.tenant.quiet.v1": "quiet",
    "settler.quota.threshold.v1": "quota-threshold",
}


def check_tables(recording: Recording, findings: Findings) -> None:
    """Every table that a projection or an executor writes."""
    _jobs(recording, findings)
    _result_rows(recording, findings)
    _usage(recording, findings)
    _signals(recording, findings)
    _letters(recording, findings)
    _seen(recording, findings)


def _differences(what: str, stored: dict[Any, Any], wanted: dict[Any, Any], findings: Findings) -> None:
    findings.claim("lost", f"{what} without a row", wanted.keys() - stored.keys())
    findings.claim("doubled", f"rows of {what} that nothing led to", stored.keys() - wanted.keys())
    wrong = [
        f"{key}: {stored[key]}, not {wanted[key]}"
        for key in stored.keys() & wanted.keys()
        if stored[key] != wanted[key]
    ]
    findings.claim("rows", f"rows of {what} that say something else", wrong)


def _jobs(recording: Recording, findings: Findings) -> None:
    wanted: dict[tuple[str, str], list[Any]] = {}
    for entry in recording.of_type("job-decisions", DECIDED):
        said = "admitted" if entry.data["admitted"] else "rejected"
        wanted[entry.tenant, entry.data["job_id"]] = [said, entry.data.get("reason"), entry.offset, None, None, None]
    for entry in recording.of_type("job-results", FINISHED):
        row = wanted.setdefault((entry.tenant, entry.data["job_id"]), [None] * 6)
        row[3:] = [entry.data["status"], entry.data["attempt"] or None, entry.offset]
    columns = ("decision", "reason", "decision_version", "outcome", "accepted_attempt", "result_version")
    stored = {(r["tenant_id"], r["job_id"]): [r[column] for column in columns] for r in recording.tables["jobs"]}
    findings.figures["rows of jobs"] = len(stored)
    _crossed("jobs", {job: tenant for tenant, job in stored}, {job: tenant for tenant, job in wanted}, findings)
    _differences("jobs", stored, wanted, findings)


def _crossed(what: str, stored: dict[str, str], wanted: dict[str, str], findings: Findings) -> None:
    foreign = [f"{job} under {tenant}" for job, tenant in stored.items() if wanted.get(job, tenant) != tenant]
    findings.claim("crossing", f"{what} under another tenant", foreign)


def _result_rows(recording: Recording, findings: Findings) -> None:
    """The rows of the accepted attempt are as many as its result says; of other attempts there may be any number."""
    results = {e.data["job_id"]: e for e in recording.of_type("job-results", FINISHED)}
    owners = {e.data["job_id"]: e.tenant for e in recording.of_type("job-decisions", DECIDED)}
    executions = {(r["tenant_id"], r["job_id"], r["attempt"]): r["status"] for r in recording.tables["executions"]}
    wanted = {(e.tenant, job, e.data["attempt"]): e.data["status"] for job, e in results.items() if e.data["attempt"]}
    _differences("executions", executions, wanted, findings)
    for table, field in (("matches", "matches"), ("unmatched", "unmatched")):
        rows = {(r["job_id"], r["attempt"]): r for r in recording.tables[table]}
        foreign = [f"{job}" for (job, _), r in rows.items() if owners.get(job) != r["tenant_id"]]
        findings.claim("crossing", f"{table} of a job under another tenant", foreign)
        wrong = []
        for job, result in results.items():
            row: Row = rows.get((job, result.data["attempt"]), {"rows": 0})
            if result.data["status"] == "succeeded" and row["rows"] != result.data.get(field, 0):
                wrong.append(f"{job}: {row['rows']}, not {result.data.get(field, 0)}")
        findings.claim("rows", f"results whose {table} are not as many as announced", wrong)
        findings.figures[f"rows of {table}"] = sum(r["rows"] for r in recording.tables[table])


def _usage(recording: Recording, findings: Findings) -> None:
    newest: dict[str, Entry] = {}
    for entry in recording.of_type("tenant-signals", USAGE):
        if entry.tenant not in newest or entry.offset > newest[entry.tenant].offset:
            newest[entry.tenant] = entry
    usage, quotas = {}, {}
    for tenant, entry in newest.items():
        said = entry.data
        for resource, quantity in said["used"].items():
            usage[tenant, resource] = (quantity, entry.offset)
        for quota, limit in said["limits"].items():
            used = said["used"].get(QUOTA_USED.get(quota, ""), 0)
            reserved = said["running"] if quota == "concurrent_jobs" else 0
            quotas[tenant, quota] = (used, reserved, limit, entry.offset)
        burst = (said.get("rate_tokens_used", 0), 0, said.get("rate_burst", 0), entry.offset)
        quotas[tenant, "rate_limit"] = burst
    stored = {
        (r["tenant_id"], r["resource"]): (r["quantity"], r["source_version"]) for r in recording.tables["tenant_usage"]
    }
    columns = ("used", "reserved", "limit_value", "source_version")
    limits = {
        (r["tenant_id"], r["quota_type"]): tuple(r[c] for c in columns) for r in recording.tables["tenant_quota_usage"]
    }
    findings.figures["rows of usage"] = len(stored) + len(limits)
    for what, found, wanted in (("usage", stored, usage), ("quota usage", limits, quotas)):
        wrong = [
            f"{k}: {found.get(k)}, not {wanted.get(k)}"
            for k in found.keys() | wanted.keys()
            if found.get(k) != wanted.get(k)
        ]
        findings.claim("counters", f"rows of {what} that differ from the last report", wrong)


def _signals(recording: Recording, findings: Findings) -> None:
    wanted = {
        (e.tenant, e.event["id"]): SIGNALS[e.type] for e in recording.entries("tenant-signals") if e.type in SIGNALS
    }
    stored = {(r["tenant_id"], r["signal_id"]): r["kind"] for r in recording.tables["tenant_signals"]}
    _differences("signals", stored, wanted, findings)
    flags: dict[tuple[str, str], Any] = {}
    for entry in recording.entries("flag-changes"):
        said = entry.data
        flags[entry.tenant, said["flag"]] = (said.get("enabled", True), said.get("killed", False), said["version"])
    rows = {
        (r["tenant_id"], r["flag"]): (r["enabled"], r["killed"], r["source_version"])
        for r in recording.tables["feature_flags"]
    }
    _differences("flags", rows, flags, findings)
    entries = Counter(r["tenant_id"] for r in recording.tables["audit_logs"] if r["action"].startswith("flag."))
    findings.equal(
        "lost", "audit entries of flags", entries, Counter(e.tenant for e in recording.entries("flag-changes"))
    )


def _letters(recording: Recording, findings: Findings) -> None:
    wanted = {(e.partition, e.offset): e.headers["dl-reason"].decode() for e in recording.entries("dead-letters")}
    stored = {(r["letter_partition"], r["letter_offset"]): r["reason"] for r in recording.tables["dead_letters"]}
    _differences("dead letters", stored, wanted, findings)
    findings.claim("lost", "events that never left the outbox", [r["id"] for r in recording.tables["outbox"]])


def _seen(recording: Recording, findings: Findings) -> None:
    """In its own context a tenant sees all of its rows, and none of another's."""
    foreign, hidden, looks = [], [], 0
    for tenant, tables in recording.seen_by.items():
        for name, (shown, others) in tables.items():
            looks += 1
            if others:
                foreign.append(f"{tenant} sees {others} rows of others in {name}")
            column = "id" if name == "tenants" else "tenant_id"
            own = sum(row.get("rows", 1) for row in recording.tables[name] if row[column] == tenant)
            if shown - others != own:
                hidden.append(f"{tenant} sees {shown} rows of {own} in {name}")
    findings.figures["looks as a tenant"] = looks
    findings.claim("crossing", "tenants that see another's rows", foreign)
    findings.claim("crossing", "tenants that do not see all of their own rows", hidden)
