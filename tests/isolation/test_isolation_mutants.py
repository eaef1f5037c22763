"""Each way to weaken isolation by one step is noticed. SETTLER_MUTANTS=file records which check noticed each."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import asyncpg
import pytest

from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.inventory import differences
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.isolation.probe import ROW_ID, A, B, findings
from tests.isolation.weakenings import mutants

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture
async def filled(owner):
    """Both tenants, and one row of B in every table."""
    for tenant_id, slug in ((A, "a"), (B, "b")):
        await owner.execute(
            "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, $2, 'free')", tenant_id, slug
        )
    for statement in ROWS.values():
        await owner.execute(statement, B, ROW_ID)
    await owner.execute("UPDATE jobs SET accepted_attempt = 1")
    await owner.execute("INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, 't', 'k', '')", B)
    await owner.execute(
        "INSERT INTO tenant_schemas (tenant_id, schema_name, layout) SELECT $1, $2, 1",
        B, f"t_{B.replace('-', '')}",
    )  # fmt: skip
    await owner.execute("INSERT INTO erasures (tenant_id, root_id, version, asked_by) VALUES ($1, $1, 2, 'a')", B)
    return owner


RECORD = os.environ.get("SETTLER_MUTANTS")
ATTACKED = {
    "enable",
    "all policies",
    "restrictive policy dropped",
    "unique key",
    "foreign key",
    "security_invoker",
    "role",
    "membership",
}
"""Where the attack alone must notice some; it is not tried on the others unless the whole table is recorded."""


async def noticed_by(owner: asyncpg.Connection, sql: str, *, attack: bool = True) -> dict[str, str]:
    """Check to what it said, for those that noticed the change."""
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(sql)
        said = {"rule": next(iter(await violations(owner)), "")}
        if not said["rule"] or RECORD:
            said["reviewed list"] = next(iter(await differences(owner)), "")
        if attack:
            said["attack"] = await findings(owner, ROWS)
        return {check: text for check, text in said.items() if text}
    finally:
        await transaction.rollback()
        await owner.execute("RESET SESSION AUTHORIZATION; RESET ALL")


def record(lines: str) -> None:
    if RECORD:
        Path(RECORD).write_text(lines + "\n")


async def test_every_mutant_is_noticed(filled, capsys):
    assert await noticed_by(filled, "SELECT 1") == {}
    table, unnoticed = [], []
    for mutant in await mutants(filled):
        noticed = await noticed_by(filled, mutant.sql, attack=bool(RECORD) or mutant.kind in ATTACKED)
        table.append((mutant, noticed))
        if not noticed:
            unnoticed.append(mutant.sql)
    assert unnoticed == []
    kinds = Counter(mutant.kind for mutant, _ in table)
    caught = Counter((mutant.kind, check) for mutant, noticed in table for check in noticed)
    # The kinds that the design names are there, each for every object.
    assert kinds["enable"] > 15
    assert kinds["unique key"] > 15
    restrictive = await filled.fetchval("SELECT count(*) FROM pg_policy WHERE NOT polpermissive")
    assert kinds["restrictive policy dropped"] == restrictive
    # It is not the catalogue alone that tells.
    assert caught["all policies", "attack"] == kinds["all policies"] - 1  # the outbox is not readable in a context
    assert caught["enable", "attack"] >= 15
    assert caught["restrictive policy dropped", "attack"] >= 15
    assert caught["security_invoker", "attack"] == kinds["security_invoker"]
    lines = [f"{'weakened':32}{'mutants':>8}{'rule':>8}{'reviewed':>10}{'attack':>8}"]
    for kind, number in kinds.items():
        rule, reviewed, attack = (caught[kind, check] for check in ("rule", "reviewed list", "attack"))
        lines.append(f"{kind:32}{number:8}{rule:8}{reviewed:10}{attack:8}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
    record("\n".join(f"{mutant.kind}\t{mutant.sql}\t{noticed}" for mutant, noticed in table))
