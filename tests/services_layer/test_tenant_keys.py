"""API keys over time: listed, narrowed, ended, replaced; what a key may do is asked anew with every request."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import ApiKeys, AuthenticationError, Scope
from tests.services_layer.platform import Platform
from tests.services_layer.test_tenant_life import audit_of

pytestmark = pytest.mark.services


@pytest.fixture
def keys(platform: Platform) -> ApiKeys:
    return platform.tenants.api_keys


def ahead(days: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


async def test_keys_are_listed_without_what_would_let_anyone_use_them(platform: Platform, keys: ApiKeys) -> None:
    tenant = (await platform.new_tenant()).tenant
    ends = ahead(1)
    first = await keys.issue(tenant.id, [Scope.JOBS_READ], name="reader", expires_at=ends)
    second = await keys.issue(tenant.id, list(Scope))
    await keys.revoke(tenant.id, second.id)
    listed = await keys.list(tenant.id)
    assert [(key.id, key.name, key.scopes) for key in listed] == [
        (first.id, "reader", frozenset([Scope.JOBS_READ])), (second.id, "default", frozenset(Scope)),
    ]  # fmt: skip
    assert [key.in_force(dt.datetime.now(dt.UTC)) for key in listed] == [True, False]
    assert (listed[0].expires_at, listed[0].in_force(ends)) == (ends, False)
    assert await keys.list(tenant.id, limit=1) == listed[:1]
    assert await keys.list(tenant.id, after=first.id) == listed[1:]
    assert first.key.split("_", 2)[2] not in str(listed)


async def test_a_key_does_what_its_scopes_say_now(platform: Platform, keys: ApiKeys) -> None:
    tenant = (await platform.new_tenant()).tenant
    issued = await keys.issue(tenant.id, [Scope.JOBS_READ, Scope.JOBS_WRITE])
    await keys.change_scopes(tenant.id, issued.id, ["jobs:read"], actor="me", request_id="r-1")
    assert (await keys.authenticate(issued.key)).scopes == {"jobs:read"}
    entry = (await audit_of(platform, tenant.id))[-1]
    assert (entry["action"], entry["actor"], entry["request_id"]) == ("api-key.scopes-changed", "me", "r-1")
    assert (entry["before"]["scopes"], entry["after"]["scopes"]) == (["jobs:read", "jobs:write"], ["jobs:read"])
    with pytest.raises(InvalidRequestError, match="there are jobs:read"):
        await keys.change_scopes(tenant.id, issued.id, ["jobs:juggle"])


async def test_a_key_ends_when_it_was_said_to(platform: Platform, keys: ApiKeys) -> None:
    tenant = (await platform.new_tenant()).tenant
    issued = await keys.issue(tenant.id, [Scope.JOBS_READ])
    await keys.change_expiry(tenant.id, issued.id, ahead(1))
    await keys.authenticate(issued.key)
    await keys.change_expiry(tenant.id, issued.id, None)
    for wrong in (ahead(-1), ahead(1).replace(tzinfo=None)):
        for call in (keys.change_expiry(tenant.id, issued.id, wrong), keys.issue(tenant.id, [], expires_at=wrong)):
            with pytest.raises(InvalidRequestError):
                await call
    async with platform.pool.tenant(tenant.id) as tx:
        await tx.execute("UPDATE api_keys SET expires_at = now() WHERE id = $1", issued.id)
    with pytest.raises(AuthenticationError):
        await keys.authenticate(issued.key)
    with pytest.raises(NotFoundError, match="in force"):
        await keys.change_expiry(tenant.id, issued.id, ahead(1))


async def test_a_rotated_key_overlaps_with_the_new_one(platform: Platform, keys: ApiKeys) -> None:
    tenant = (await platform.new_tenant()).tenant
    old = await keys.issue(tenant.id, [Scope.JOBS_READ], name="reader")
    new = await keys.rotate(tenant.id, old.id, overlap=dt.timedelta(hours=1), actor="me", request_id="r-2")
    for key in (old, new):
        assert (await keys.authenticate(key.key)).scopes == {"jobs:read"}
    stored = {key.id: key for key in await keys.list(tenant.id)}
    assert (stored[new.id].name, stored[new.id].expires_at) == ("reader", None)
    ends = stored[old.id].expires_at
    assert ends is not None
    assert ahead(0) < ends <= ahead(1 / 24)
    entries = (await audit_of(platform, tenant.id))[-2:]
    assert [(e["action"], e["actor"], e["request_id"]) for e in entries] == [
        ("api-key.issued", "me", "r-2"), ("api-key.rotated", "me", "r-2"),
    ]  # fmt: skip
    assert (entries[1]["before"]["expires_at"], entries[1]["after"]["expires_at"]) == (None, str(ends))

    third = await keys.rotate(tenant.id, new.id, overlap=dt.timedelta(0))
    with pytest.raises(AuthenticationError):
        await keys.authenticate(new.key)
    await keys.authenticate(third.key)
    with pytest.raises(NotFoundError):
        await keys.rotate(tenant.id, new.id)


async def test_a_rotation_never_lets_the_old_key_live_longer_and_gives_the_new_one_as_long_a_life(
    platform: Platform, keys: ApiKeys
) -> None:
    tenant = (await platform.new_tenant()).tenant
    old = await keys.issue(tenant.id, [Scope.JOBS_READ], expires_at=ahead(0.5))
    new = await keys.rotate(tenant.id, old.id, overlap=dt.timedelta(days=30))
    stored = {key.id: key for key in await keys.list(tenant.id)}
    assert stored[old.id].expires_at == old.expires_at
    assert new.expires_at is not None
    assert old.expires_at is not None
    assert old.expires_at <= new.expires_at <= ahead(0.5)
    for wrong in (dt.timedelta(days=-1), dt.timedelta(days=31)):
        with pytest.raises(InvalidRequestError, match="0 to 30 days"):
            await keys.rotate(tenant.id, old.id, overlap=wrong)


@pytest.mark.parametrize("at_once", [False, True])
async def test_each_rotation_of_a_key_gives_the_life_that_it_had_before_the_first(
    platform: Platform, keys: ApiKeys, at_once: bool
) -> None:
    tenant = (await platform.new_tenant()).tenant

    async def rotated(key_id: str) -> list[dt.datetime | None]:
        if at_once:
            made = await asyncio.gather(*(keys.rotate(tenant.id, key_id) for _ in range(3)))
        else:
            made = [await keys.rotate(tenant.id, key_id, overlap=dt.timedelta(days=left)) for left in (30, 1, 2)]
        return [key.expires_at for key in made]

    endless = await keys.issue(tenant.id, [Scope.JOBS_READ])
    assert await rotated(endless.id) == [None] * 3
    ending = await keys.issue(tenant.id, [Scope.JOBS_READ], expires_at=ahead(90))
    for ends in await rotated(ending.id):
        assert ends is not None
        assert ahead(89.9) < ends < ahead(90.1)
    await keys.change_expiry(tenant.id, ending.id, ahead(20).astimezone(dt.timezone(dt.timedelta(hours=2))))
    for ends in await rotated(ending.id):
        assert ends is not None
        assert ahead(19.9) < ends < ahead(20.1), "a changed end counts from then on"
    await keys.change_expiry(tenant.id, ending.id, None)
    assert await rotated(ending.id) == [None] * 3


async def test_rotations_at_once_leave_no_key_that_nobody_holds(platform: Platform, keys: ApiKeys) -> None:
    tenant = (await platform.new_tenant()).tenant
    old = await keys.issue(tenant.id, [Scope.JOBS_READ])
    made = await asyncio.gather(*(keys.rotate(tenant.id, old.id) for _ in range(3)))
    assert {key.id for key in await keys.list(tenant.id)} == {old.id, *(key.id for key in made)}
    for key in (old, *made):
        await keys.authenticate(key.key)


async def test_keys_of_another_of_nobody_and_of_the_deleted(platform: Platform, keys: ApiKeys) -> None:
    one, other = (await platform.new_tenant()).tenant, (await platform.new_tenant()).tenant
    issued = await keys.issue(one.id, [Scope.JOBS_READ])
    for call in (
        keys.rotate(other.id, issued.id), keys.change_scopes(other.id, issued.id, []),
        keys.change_expiry(other.id, issued.id, None), keys.list(TenantId(uuid7(1))),
    ):  # fmt: skip
        with pytest.raises(NotFoundError):
            await call
    with pytest.raises(InvalidRequestError, match="UUID"):
        await keys.rotate(one.id, "mine")
    await platform.tenants.delete(one.id)
    for change in (keys.issue(one.id, []), keys.rotate(one.id, issued.id)):
        with pytest.raises(ConflictError, match="was deleted"):
            await change
    await keys.revoke(one.id, issued.id)  # less is always possible
