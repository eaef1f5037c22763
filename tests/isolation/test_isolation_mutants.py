"""Each way to weaken isolation by one step is noticed. SETTLER_MUTANTS=file: which check noticed each is added to it.

Of the shared schema all that are made are tried. Of a tenant's own each kind of weakening is tried once on each kind of
table: tables with the same policies and grants are one kind, of which one after the other is taken. The comparison with
the shared schema, as `settler tenants schema check` makes it, counts as a rule there.
"""

from __future__ import annotations

import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import asyncpg
import pytest

from settler_streams.adapters.postgres import tenant_schemas
from settler_streams.adapters.postgres.catalogue import violations
from settler_streams.adapters.postgres.inventory import differences
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.tenant_schemas import SHARED
from settler_streams.ids import TenantId
from tests.adapters.postgres.conftest import owner_of
from tests.adapters.postgres.test_postgres_isolation import ROWS
from tests.isolation.probe import ROW_ID, A, B, findings
from tests.isolation.weakenings import Mutant, mutants, schema_mutants

pytestmark = [pytest.mark.services, pytest.mark.slow]

OF_B = f"t_{B.replace('-', '')}"
"""B's own schema, where it has one."""


@pytest.fixture
async def filled(owner):
    """Both tenants, and one row of B in every table."""
    await fill(owner)
    await owner.execute("INSERT INTO tenant_schemas (tenant_id, schema_name, layout) VALUES ($1, $2, 1)", B, OF_B)
    await owner.execute("INSERT INTO erasures (tenant_id, root_id, version, asked_by) VALUES ($1, $1, 2, 'a')", B)
    return owner


@pytest.fixture
async def apart(cluster_settings):
    """As ``filled``, in a database in which B has a schema of its own."""
    settings = cluster_settings.model_copy(update={"db_name": f"apart_{uuid.uuid4().hex[:8]}"})
    await migrate(settings)
    async with owner_of(settings) as owner:
        await fill(owner)
        await tenant_schemas.move(settings, TenantId(B), own_schema=True)
        yield owner


async def fill(owner: asyncpg.Connection) -> None:
    for tenant_id, slug in ((A, "a"), (B, "b")):
        await owner.execute(
            "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, $2, 'free')", tenant_id, slug
        )
    for statement in ROWS.values():
        await owner.execute(statement, B, ROW_ID)
    await owner.execute("UPDATE jobs SET accepted_attempt = 1")
    await owner.execute("INSERT INTO outbox (tenant_id, topic, key, event) VALUES ($1, 't', 'k', '')", B)


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


async def noticed_by(
    owner: asyncpg.Connection, sql: str, *, attack: bool = True, schema: str = SHARED, known: Collection[str] = ()
) -> dict[str, str]:
    """Check to what it said, for those that noticed the change.

    Args:
        owner: of a database in which B has a row in every table.
        sql: the change, with the names of ``schema``.
        attack: whether A tries what it can do.
        schema: the one that is weakened, and attacked.
        known: what the reviewed list has said before.
    """
    transaction = owner.transaction()
    await transaction.start()
    try:
        await owner.execute(sql if schema == SHARED else f"{in_front(schema)} {sql}; {in_front(SHARED)}")
        layout = [] if schema == SHARED else await tenant_schemas.differences(owner, schema)
        said = {"rule": next(iter(layout or await violations(owner)), "")}
        if not said["rule"] or RECORD:
            said["reviewed list"] = next((line for line in await differences(owner) if line not in known), "")
        if attack:
            if schema != SHARED:
                await owner.execute(in_front(schema))
            said["attack"] = await findings(owner, ROWS)
        return {check: text for check, text in said.items() if text}
    finally:
        await transaction.rollback()
        await owner.execute("RESET SESSION AUTHORIZATION; RESET ALL")


def in_front(schema: str) -> str:
    return f"SET LOCAL search_path = {schema}, public, pg_temp;"


def record(lines: str) -> None:
    if RECORD:
        with Path(RECORD).open("a", encoding="utf-8") as file:
            file.write(lines + "\n")


async def tried(owner: asyncpg.Connection, made: Sequence[Mutant], **where) -> list[tuple[Mutant, dict[str, str]]]:
    """Each mutant and who noticed it: for every one somebody has."""
    table = [
        (mutant, await noticed_by(owner, mutant.sql, attack=bool(RECORD) or mutant.kind in ATTACKED, **where))
        for mutant in made
    ]
    assert [mutant.sql for mutant, noticed in table if not noticed] == []
    return table


async def test_every_mutant_is_noticed(filled, capsys):
    assert await noticed_by(filled, "SELECT 1") == {}
    table = await tried(filled, await mutants(filled))
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
    show(table, capsys)


async def test_every_kind_of_mutant_of_a_tenants_schema_is_noticed(apart, capsys):
    known = await differences(apart)
    assert await noticed_by(apart, "SELECT 1", schema=OF_B, known=known) == {}
    async with apart.transaction():
        await apart.execute(in_front(OF_B))
        made = await schema_mutants(apart)
        chosen = one_of_each(made, await kinds_of_tables(apart))
    table = await tried(apart, chosen, schema=OF_B, known=known)
    assert {mutant.kind for mutant in chosen} == {mutant.kind for mutant in made}
    caught = Counter(mutant.kind for mutant, noticed in table if "attack" in noticed)
    for kind in ("enable", "restrictive policy dropped", "all policies", "unique key", "security_invoker"):
        assert caught[kind] > 0, kind
    show(table, capsys)


async def kinds_of_tables(owner: asyncpg.Connection) -> dict[str, str]:
    """Each relation of the current schema to what protects it: policies and grants."""
    rows = await owner.fetch(
        "SELECT relname, concat_ws(' ', relkind, relacl::text, (SELECT string_agg(concat(polname, polcmd), ' '"
        " ORDER BY polname) FROM pg_policy WHERE polrelid = c.oid))"
        " FROM pg_class c WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v')"
    )
    return dict(rows)


def one_of_each(made: Sequence[Mutant], tables: Mapping[str, str]) -> list[Mutant]:
    """A mutant of each kind for each kind of table, which is the one in turn; all of those that are of no table."""
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in made:
        table = next((word for word in re.findall(r"\w+", mutant.sql) if word in tables), "")
        what = mutant.sql if mutant.kind in ("schema", "something more") else tables[table]
        groups.setdefault((mutant.kind, what), []).append(mutant)
    return [members[turn % len(members)] for turn, members in enumerate(groups.values())]


def show(table: Sequence[tuple[Mutant, dict[str, str]]], capsys) -> None:
    kinds = Counter(mutant.kind for mutant, _ in table)
    caught = Counter((mutant.kind, check) for mutant, noticed in table for check in noticed)
    lines = [f"{'weakened':42}{'mutants':>8}{'rule':>8}{'reviewed':>10}{'attack':>8}"]
    for kind, number in kinds.items():
        rule, reviewed, attack = (caught[kind, check] for check in ("rule", "reviewed list", "attack"))
        lines.append(f"{kind:42}{number:8}{rule:8}{reviewed:10}{attack:8}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + f"\n{len(table)} in all\n")
    record("\n".join(f"{mutant.kind}\t{mutant.sql}\t{noticed}" for mutant, noticed in table))
