"""Commands against a real broker and a real database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from settler_streams.adapters.postgres.tenant_schemas import owner_connection
from settler_streams.cli import retention
from settler_streams.errors import UnavailableError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import RetentionService, Swept
from tests.cli.in_process import invoke

if TYPE_CHECKING:
    from settler_streams.settings import Settings
    from tests.services.interface import Services

pytestmark = pytest.mark.services

Cli = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def settings(services: Services, kafka: object, postgres: object, database: str, deployment: str) -> Settings:
    return services.settings.model_copy(
        update={"deployment": deployment, "db_name": database.rpartition("/")[2], "redis_host": "localhost"}
    )


@pytest.fixture
def new_tenant(cli: Cli, settings: Settings) -> Callable[[], str]:
    """Makes a tenant without waiting for admission, which does not run here."""

    async def insert() -> str:
        tenant = uuid7(time.time_ns() // 1_000_000)
        async with owner_connection(settings) as connection:
            await connection.execute(
                "INSERT INTO tenants (id, root_id, slug, name, tier) VALUES ($1, $1, $2, 'A', 'free')",
                tenant, f"t-{tenant}",
            )  # fmt: skip
        return tenant

    def make() -> str:
        cli("migrate")
        return asyncio.run(insert())

    return make


@pytest.fixture(scope="module")
def cli(settings: Settings) -> Cli:
    def run(*arguments: str) -> tuple[int, Any]:
        code, printed, _ = invoke(arguments, settings.environment())
        return code, printed

    return run


def test_the_topology_is_planned_applied_and_checked(cli: Cli) -> None:
    code, plan = cli("topology", "plan")
    assert code == 3
    assert {difference["what"] for difference in plan} == {"topic"}
    assert cli("topology", "check") == (3, {"agrees": False, "differences": len(plan)})
    code, done = cli("topology", "apply")
    assert (code, done) == (0, plan)
    assert cli("topology", "plan") == (0, [])
    assert cli("topology", "check") == (0, {"agrees": True, "differences": 0})


def test_migrations_are_applied_once_and_undone(cli: Cli) -> None:
    code, first = cli("migrate")
    assert code == 0
    assert first["applied"][0].startswith("0001_")
    assert cli("migrate") == (0, {"applied": [], "undone": []})
    *_, before, last = first["applied"]
    assert cli("migrate", "--to", str(int(last[:4]))) == (0, {"applied": [], "undone": []})
    assert cli("migrate", "--to", str(int(before[:4]))) == (0, {"applied": [], "undone": [last]})
    assert cli("migrate") == (0, {"applied": [last], "undone": []})
    assert cli("migrate", "--to", "9999") == (1, None), "no migration has that number"


def test_a_tenants_past_schema_and_export(cli: Cli, new_tenant: Callable[[], str], tmp_path: Path) -> None:
    cli("topology", "apply")
    tenant = new_tenant()
    kept = {"executions": "forever", "usage": "forever", "audit": "forever"}
    assert cli("tenants", "retention", tenant) == (0, kept)
    changed = cli("tenants", "retention", tenant, "--usage", "30", "--audit", "400")
    assert changed == (0, kept | {"usage": 30, "audit": 400})
    assert cli("tenants", "retention", tenant, "--audit", "forever") == (0, kept | {"usage": 30})
    assert cli("tenants", "retention", tenant, "--audit", "7") == (4, None)
    assert cli("tenants", "sweep", tenant) == (0, {"jobs": 0, "usage": 0, "audit": 0})

    code, moved = cli("tenants", "schema", "move", tenant, "own")
    assert (code, moved["moved_rows"]) == (0, 3), "the retention of usage, and two changes in the audit log"
    assert cli("tenants", "schema", "check") == (0, {f"t_{tenant.replace('-', '')}": []})

    folder = tmp_path / "export"
    code, manifest = cli("tenants", "export", tenant, str(folder))
    assert (code, manifest["tenant_id"]) == (0, tenant)
    assert cli("tenants", "verify-export", str(folder)) == (0, [])
    (folder / "tables/audit_logs.jsonl").unlink()
    assert cli("tenants", "verify-export", str(folder)) == (3, ["tables/audit_logs.jsonl is missing"])
    assert cli("tenants", "export", tenant, str(folder)) == (4, None)
    moved_back = {
        "moved_rows": moved["moved_rows"] + 2
    }  # the audit log has the move, and the export, the other was refused
    assert cli("tenants", "schema", "move", tenant, "shared") == (0, moved_back)


def test_a_sweep_of_all_tenants_names_those_that_were_not_swept(
    cli: Cli, settings: Settings, new_tenant: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, behind = (TenantId(new_tenant()) for _ in range(2))
    sweep, asked = RetentionService.sweep, []

    async def fails_for_one(service: RetentionService, tenant_id: TenantId) -> Swept:
        asked.append(tenant_id)
        if tenant_id == broken:
            raise UnavailableError("canceling statement due to statement timeout")
        return await sweep(service, tenant_id)

    async def everybody(_settings: Settings) -> list[TenantId]:
        return [broken, behind]

    monkeypatch.setattr(RetentionService, "sweep", fails_for_one)
    monkeypatch.setattr(retention, "_everybody", everybody)
    code, _, error = invoke(("tenants", "sweep"), settings.environment())
    assert (code, error) == (75, f"not swept, try again later: {broken}")
    assert asked == [broken, behind]
    assert cli("tenants", "sweep", behind)[0] == 0


def test_dead_letters_are_listed_and_a_missing_one_is_refused(cli: Cli) -> None:
    cli("topology", "apply")
    assert cli("dlq", "list") == (0, [])
    assert cli("dlq", "show", "0-0") == (4, None)
    assert cli("dlq", "redrive", "--all") == (0, {"sent": [], "quarantined": [], "already_redriven": []})
    assert cli("dlq", "redrive", "0-7")[0] == 4
