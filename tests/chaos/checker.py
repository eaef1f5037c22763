"""The checker: everything that a recording must hold, by code that shares nothing with what it checks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import yaml

from settler_streams.published import TOPOLOGY
from tests.chaos.check_counters import check_counters
from tests.chaos.check_ledger import check_ledger
from tests.chaos.check_noise import check_noise
from tests.chaos.check_positions import check_positions
from tests.chaos.check_tables import check_tables
from tests.chaos.findings import Findings
from tests.chaos.load import Sent
from tests.chaos.recording import Recording

INVARIANTS = {
    "lost": "nothing is lost: each request one decision, each admitted job one result, each bad record one dead letter",
    "doubled": "nothing is doubled: no decision, place, attempt, result, event id or dead letter of a fold twice",
    "order": "each tenant's decisions and places are in the order of its requests",
    "counters": "counters equal a fold of the checker's own: every decision, report, stored value and row",
    "positions": "positions are unbroken and never go back: journals, state, Kafka's offsets, Postgres",
    "quotas": "no limit is exceeded at any record of the log",
    "crossing": "no record and no row is under another tenant or key",
    "rows": "the rows in Postgres say what the topics say",
}


def topics() -> dict[str, int]:
    """Every topic of a deployment and its partitions, as the topology declares them."""
    declared = _declared()
    counts = {"tenants": declared["tenant_partitions"], "pools": declared["worker_pools"]}
    partitions = {t["name"]: counts.get(t["partitions"], t["partitions"]) for t in declared["topics"]}
    for fold in declared["folds"]:
        for kind in ("changelog", "journal"):
            partitions[f"{fold['role']}-{kind}"] = partitions[fold["inputs"][0]]
    return partitions


def fold_inputs() -> dict[str, tuple[str, ...]]:
    """The inputs of each fold role."""
    return {fold["role"]: tuple(fold["inputs"]) for fold in _declared()["folds"]}


def projection_inputs() -> dict[str, tuple[str, ...]]:
    """The inputs of each projection role."""
    return {role["role"]: tuple(role["inputs"]) for role in _declared()["projections"]}


def check(recording: Recording, ledger: Mapping[int, Sent], told: Mapping[str, bool]) -> Findings:
    """Check everything.

    Args:
        recording: what was there in the end.
        ledger: what the load has sent.
        told: per job that was submitted over HTTP and answered with its decision: whether it was admitted.
    """
    findings = Findings()
    check_ledger(recording, ledger, findings)
    check_positions(recording, fold_inputs(), projection_inputs(), findings)
    check_counters(recording, findings)
    check_noise(recording, findings)
    check_tables(recording, findings)
    decided = {e.data["job_id"]: e.data["admitted"] for e in recording.entries("job-decisions")}
    findings.figures["answers over HTTP"] = len(told)
    wrong = [
        f"{job}: told {said}, decided {decided.get(job)}" for job, said in told.items() if decided.get(job) != said
    ]
    findings.claim("lost", "answers over HTTP that are not the log's", wrong)
    return findings


@lru_cache(maxsize=1)
def _declared() -> dict[str, object]:
    read: dict[str, object] = yaml.safe_load((TOPOLOGY / "topics.yaml").read_text(encoding="utf-8"))
    return read
