"""``settler tenants erase``: asks before it erases, erases all that is due, and says what it has erased."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from settler_streams.cli import erasure
from settler_streams.settings import Settings
from tests.cli.test_cli_tenants import REFUSED, Cli, cli, done, new_tenant
from tests.services_layer.platform import Platform, running_role, settled

__all__ = ["cli"]

pytestmark = pytest.mark.services


@pytest_asyncio.fixture(scope="module", autouse=True)
async def folds(platform: Platform) -> AsyncIterator[None]:
    """Those that have to forget, beside admission."""
    async with contextlib.AsyncExitStack() as stack:
        for role in ("scheduler", "flags"):
            await stack.enter_async_context(running_role(role, platform.settings))
        yield


async def deleted(cli: Cli, *more: str) -> dict[str, str]:
    tenant = await new_tenant(cli, *more)
    if not more:
        await done(cli, "delete", tenant["id"], "--grace-days", "0")
    return tenant


async def test_a_tenant_is_erased_once_its_id_or_slug_was_typed(cli: Cli, platform: Platform) -> None:
    by_id, by_slug = await deleted(cli), await deleted(cli)
    code, said = await cli("erase", by_id["id"], given=f"{by_slug['slug']}\n")
    assert (code, "nothing was erased" in said) == (REFUSED, True)
    assert (await done(cli, "show", by_id["id"]))["status"] == "deleted"
    for tenant, typed in ((by_id, by_id["id"]), (by_slug, by_slug["slug"])):
        record = await done(cli, "erase", tenant["id"], given=f"{typed}\n")
        assert (record["tenant_id"], record["asked_by"]) == (tenant["id"], "cli")
        assert record["ended_at"] is not None
        assert record["counts"]["table/users"] == 1
        assert await done(cli, "erase", tenant["id"], "--yes") == record, "a second time it only tells"
        code, said = await cli("show", tenant["id"])
        assert (code, "was erased" in said) == (REFUSED, True)


async def test_what_is_not_due_is_refused(cli: Cli) -> None:
    tenant = (await new_tenant(cli))["id"]
    code, said = await cli("erase", tenant, "--yes")
    assert (code, "only what was deleted" in said) == (REFUSED, True)
    await done(cli, "delete", tenant, "--grace-days", "1")
    code, said = await cli("erase", tenant, "--yes")
    assert (code, "can be restored until" in said) == (REFUSED, True)
    for wrong in (("erase", "--yes"), ("erase", tenant, "--due", "--yes")):
        code, said = await cli(*wrong)
        assert (code, "name one tenant, or say --due" in said) == (REFUSED, True)


async def test_all_that_is_due_is_erased_children_first_once_their_number_was_typed(
    cli: Cli, platform: Platform
) -> None:
    parent = await new_tenant(cli)
    child = await new_tenant(cli, "--parent", parent["id"])
    for tenant in (child, parent):
        await done(cli, "delete", tenant["id"], "--grace-days", "0")
    await settled(platform.directory.feed, lambda: _is_deleted(platform, parent["id"]))
    assert [each["id"] for each in await done(cli, "erasable")] == [child["id"], parent["id"]]
    code, said = await cli("erase", "--due", given="1\n")
    assert (code, "nothing was erased" in said) == (REFUSED, True)
    records = await done(cli, "erase", "--due", given="2\n")
    assert [record["tenant_id"] for record in records] == [child["id"], parent["id"]]
    assert await done(cli, "erase", "--due") == []


async def test_a_parent_whose_child_is_not_due_yet_holds_up_nobody(cli: Cli) -> None:
    parent = await new_tenant(cli)
    child = await new_tenant(cli, "--parent", parent["id"])
    await done(cli, "delete", child["id"], "--grace-days", "1")
    await done(cli, "delete", parent["id"], "--grace-days", "0")
    behind = await deleted(cli)
    assert [each["id"] for each in await done(cli, "erasable")] == [behind["id"]]
    assert [record["tenant_id"] for record in await done(cli, "erase", "--due", "--yes")] == [behind["id"]]


async def test_one_that_is_refused_all_the_same_holds_up_nobody_and_is_named_at_the_end(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, behind = await new_tenant(cli), await deleted(cli)

    async def due(_settings: Settings) -> list[str]:
        return [refused["id"], behind["id"]]

    monkeypatch.setattr(erasure, "_due", due)
    code, said = await cli("erase", "--due", "--yes")
    assert (code, f"tenant {refused['id']} is active; only what was deleted" in said) == (REFUSED, True)
    code, said = await cli("show", behind["id"])
    assert (code, "was erased" in said) == (REFUSED, True)


def _is_deleted(platform: Platform, tenant_id: str) -> bool:
    found = platform.directory.get(tenant_id)  # type: ignore[arg-type]
    return found is not None and found.status == "deleted"
