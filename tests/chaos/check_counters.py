"""Counters and quotas: an admission of its own follows the journals and must come to the same figures.

It reads what each step consumed, in that order, and keeps per tenant: running jobs, this month's jobs, requests,
storage, domains, and the tokens of the rate limit. Every decision is then either allowed or required by these figures;
every usage report must equal them, and so must the stored state and the rows in Postgres at the end.
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
import yaml

from settler_streams.published import TOPOLOGY
from tests.chaos.check_ledger import DECIDED, FINISHED, REQUESTED, TICK, is_home
from tests.chaos.findings import Findings
from tests.chaos.recording import Entry, Recording

UNITS = 60_000 * 1_000
"""One token of the rate limit, in whole units of refill per millisecond and per mille."""
CHANGED, RECORDED, USAGE = "settler.tenant.changed.v1", "settler.usage.recorded.v1", "settler.tenant.usage.v1"


@dataclass
class Account:
    """What is known of a tenant, and what it has used."""

    version: int
    tier: dict[str, Any]
    limits: dict[str, int]
    burst: int
    status: str
    parent: str | None
    level: int
    at_ms: int
    running: int = 0
    month: int = 0
    month_jobs: int = 0
    requests: int = 0
    storage: int = 0
    domains: int = 0

    def settle(self, now_ms: int) -> int:
        """The bucket's level at ``now_ms``."""
        if now_ms > self.at_ms:
            self.level = min(self.burst * UNITS, self.level + (now_ms - self.at_ms) * self.limits["rate_limit"] * 1_000)
            self.at_ms = now_ms
        return self.level

    def used(self, month: int) -> dict[str, int]:
        """As a usage report says it."""
        jobs = self.month_jobs if self.month == month else 0
        return {
            "requests": self.requests, "storage_bytes": self.storage, "custom_domains": self.domains,
            "reconciliations": jobs,
        }  # fmt: skip


@dataclass
class Books:
    """The accounts of one partition, and what they say of its decisions and reports."""

    recording: Recording
    partition: int
    tiers: Mapping[str, dict[str, Any]]
    decisions: Mapping[str, Entry]
    accounts: dict[str, Account] = field(default_factory=dict)
    open_jobs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)
    reports: dict[str, list[tuple[int, int, dict[str, int]]]] = field(default_factory=lambda: defaultdict(list))
    wrong: list[str] = field(default_factory=list)
    over: list[str] = field(default_factory=list)

    def take(self, entry: Entry, now_ms: int) -> None:
        """Follow one record."""
        if entry.poison or (not is_home(entry, self.recording.partitions[entry.topic]) and entry.type != TICK):
            return
        if entry.type == TICK:
            self._report(now_ms)
        elif entry.type == CHANGED:
            self._tenant(entry, now_ms)
        elif entry.type == FINISHED:
            self._finished(entry)
        elif entry.event.get("id") not in self.seen and entry.type in (REQUESTED, RECORDED):
            self.seen.add(entry.event["id"])
            if entry.type == REQUESTED:
                self._requested(entry, now_ms)
            else:
                self._used(entry)

    def _tenant(self, entry: Entry, now_ms: int) -> None:
        said, known = entry.data, self.accounts.get(entry.tenant)
        if known is not None and known.version >= said["version"]:
            return
        tier = self.tiers[said["tier"]]
        limits = {name: tier[name] for name in ("rate_limit", "concurrent_jobs", "monthly_reconciliations")}
        limits |= {name: limit for name, limit in said.get("quotas", {}).items() if name in limits}
        burst = said.get("burst") or min(tier["burst"], max(1, limits["rate_limit"]))
        parts = (said["version"], tier, limits, burst, said["status"], said.get("parent_id"))
        if known is None:
            self.accounts[entry.tenant] = Account(*parts, level=burst * UNITS, at_ms=now_ms)
        else:
            level = min(known.settle(now_ms), burst * UNITS)
            known.version, known.tier, known.limits, known.burst, known.status, known.parent = parts
            known.level = level
        self.touched.add(entry.tenant)

    def chain(self, tenant: str) -> tuple[str, ...]:
        """The tenant and its parents."""
        found = [tenant]
        while (parent := self.accounts[found[-1]].parent) is not None and parent in self.accounts:
            found.append(parent)
        return tuple(found)

    def _requested(self, entry: Entry, now_ms: int) -> None:
        decision = self.decisions.get(entry.event["id"])
        if decision is None:
            return  # the ledger says so
        said = decision.data
        if entry.tenant not in self.accounts:
            if said["admitted"] or said["reason"] != "unknown_tenant":
                self.wrong.append(f"{decision.where}: the tenant is not known")
            return
        if said["decided_at_ms"] != now_ms:
            self.wrong.append(f"{decision.where}: decided at {said['decided_at_ms']}, the log's time is {now_ms}")
        chain = self.chain(entry.tenant)
        accounts = [self.accounts[member] for member in chain]
        month = month_of(now_ms)
        for account in accounts:
            if account.month != month:
                account.month, account.month_jobs = month, 0
        refusals = self._refusals(accounts, now_ms)
        if not said["admitted"]:
            self._rejected(decision, refusals)
            return
        if refusals:
            self.over.append(f"{decision.where}: admitted against {sorted(refusals)}")
        for account in accounts:
            if not accounts[0].tier.get("enterprise"):
                account.level = account.settle(now_ms) - UNITS
            account.running += 1
            account.month_jobs += 1
            account.requests += 1
        self.open_jobs[entry.event["id"]] = chain
        self.touched |= set(chain)

    def _refusals(self, accounts: list[Account], now_ms: int) -> dict[str, set[int]]:
        """Why this request may not be admitted: the reason, and what ``current`` may then say."""
        found: dict[str, set[int]] = defaultdict(set)
        if any(account.status != "active" for account in accounts):
            found["tenant_suspended"].add(-1)
        if accounts[0].tier.get("enterprise"):
            return found
        for account in accounts:
            if account.running >= account.limits["concurrent_jobs"]:
                found["concurrent_jobs"].add(account.running)
            if account.month_jobs >= account.limits["monthly_reconciliations"]:
                found["monthly_reconciliations"].add(account.month_jobs)
            if account.settle(now_ms) < UNITS:
                found["rate_limit"].add(-1)
        return found

    def _rejected(self, decision: Entry, refusals: Mapping[str, set[int]]) -> None:
        reason = decision.data["reason"]
        if reason == "flag_disabled":
            return
        currents = refusals.get(reason)
        if currents is None:
            self.wrong.append(f"{decision.where}: rejected for {reason}, which does not hold")
        elif -1 not in currents and decision.data["current"] not in currents:
            self.wrong.append(f"{decision.where}: says {decision.data['current']}, not {sorted(currents)}")

    def _finished(self, entry: Entry) -> None:
        for member in self.open_jobs.pop(entry.data["job_id"], ()):
            self.accounts[member].running -= 1
            self.touched.add(member)

    def _used(self, entry: Entry) -> None:
        resource, quantity = entry.data["resource"], entry.data["quantity"]
        if resource not in ("storage_bytes", "custom_domains") or entry.tenant not in self.accounts:
            return
        name = "storage" if resource == "storage_bytes" else "domains"
        for member in self.chain(entry.tenant):  # each changes by as much as the one below it
            before = getattr(self.accounts[member], name)
            quantity = max(0, before + quantity) - before
            setattr(self.accounts[member], name, before + quantity)
            self.touched.add(member)

    def _report(self, now_ms: int) -> None:
        for tenant in self.touched:
            account = self.accounts[tenant]
            self.reports[tenant].append((now_ms, account.running, account.used(month_of(now_ms))))
        self.touched.clear()


def check_counters(recording: Recording, findings: Findings) -> None:
    """Follow every partition, then compare decisions, reports, state and rows."""
    tiers = _tiers()
    decisions = {e.data["job_id"]: e for e in recording.of_type("job-decisions", DECIDED)}
    reports: dict[str, list[Entry]] = defaultdict(list)
    for entry in recording.of_type("tenant-signals", USAGE):
        reports[entry.tenant].append(entry)
    stored: dict[int, dict[str, bytes]] = defaultdict(dict)
    for (partition, key), value in recording.state("admission").items():
        stored[partition][key] = value
    figures = {"quota checks": 0, "usage reports": sum(map(len, reports.values()))}
    for partition in recording.logs["admission-journal"]:
        books = Books(recording, partition, tiers, decisions)
        for entry, now_ms in consumed(recording, "admission", partition):
            books.take(entry, now_ms)
        figures["quota checks"] += len(books.seen)
        findings.claim("quotas", "jobs admitted beyond a limit", books.over)
        findings.claim("counters", "decisions that the figures do not bear out", books.wrong)
        findings.claim(
            "counters", "accounts that would be below nothing", [t for t, a in books.accounts.items() if a.running < 0]
        )
        for tenant in books.accounts:
            _compare_reports(tenant, books.reports[tenant], reports[tenant], findings)
        _compare_state(books, stored[partition], findings)
    findings.figures |= figures


def consumed(recording: Recording, role: str, partition: int) -> Iterator[tuple[Entry, int]]:
    """What a fold has read, in its order, with the fold's time at each record."""
    offsets: dict[str, list[int]] = {}
    now_ms = 0
    for step in recording.logs[f"{role}-journal"][partition]:
        for run in step.data["runs"]:
            topic = run["topic"].removeprefix(f"{recording.deployment}.")
            log = recording.logs[topic][partition]
            if topic not in offsets:
                offsets[topic] = [entry.offset for entry in log]
            begin, end = bisect_left(offsets[topic], run["first"]), bisect_right(offsets[topic], run["last"])
            for entry in log[begin:end]:
                now_ms = max(now_ms, entry.timestamp)
                yield entry, now_ms


def month_of(now_ms: int) -> int:
    """Where the UTC month begins, in milliseconds."""
    now = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
    return int(dt.datetime(now.year, now.month, 1, tzinfo=dt.UTC).timestamp() * 1000)


def _compare_reports(
    tenant: str, wanted: list[tuple[int, int, dict[str, int]]], reports: list[Entry], findings: Findings
) -> None:
    said = [(e.data["as_of_ms"], e.data["running"], e.data["used"]) for e in reports]
    wrong = [f"{a} instead of {b}" for a, b in zip(said, wanted, strict=False) if a != b]
    findings.claim("counters", f"usage reports of {tenant} that are not what its records add up to", wrong)
    findings.equal("counters", f"usage reports of {tenant}", len(said), len(wanted))


def _compare_state(books: Books, values: Mapping[str, bytes], findings: Findings) -> None:
    """The changelog's last word: running, month_jobs, storage, domains, requests; and the jobs that are still open."""
    stored: dict[str, tuple[int, ...]] = {}
    jobs: list[tuple[str, tuple[str, ...]]] = []
    for key, value in values.items():
        if key.startswith("usage/"):
            _, running, month, month_jobs, storage, domains, requests, *_ = msgspec.msgpack.decode(value[1:])
            stored[key.removeprefix("usage/")] = (running, month, month_jobs, storage, domains, requests)
        if key.startswith("jobs/"):
            _, chain, _, held = msgspec.msgpack.decode(value[1:])
            jobs += [(job, tuple(chain)) for job in held]
    own = {t: (a.running, a.month, a.month_jobs, a.storage, a.domains, a.requests) for t, a in books.accounts.items()}
    wrong = [
        f"{t}: {stored.get(t)}, not {own.get(t)}" for t in own.keys() | stored.keys() if own.get(t) != stored.get(t)
    ]
    findings.claim("counters", "tenants whose stored usage is another", wrong)
    findings.claim(
        "counters",
        "jobs that hold a reservation and should not, or the reverse, or at other levels",
        set(jobs) ^ set(books.open_jobs.items()),
    )
    findings.equal("counters", "reservations and the jobs that hold them", len(jobs), len(set(jobs)))


@lru_cache(maxsize=1)
def _tiers() -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load((TOPOLOGY / "tiers.yaml").read_text(encoding="utf-8"))
    return read["tiers"]
