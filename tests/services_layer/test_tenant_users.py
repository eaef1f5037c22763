"""Users of a tenant: an address once, a password never in clear, and always an active owner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import (
    CreatedTenant,
    InvitationError,
    Role,
    User,
    UserService,
    UserStatus,
    verify_password,
)
from tests.services_layer.platform import Platform
from tests.services_layer.test_tenant_life import audit_of

pytestmark = pytest.mark.services

PASSWORD = "correct horse"


@pytest.fixture
def users(platform: Platform) -> UserService:
    return UserService(platform.pool)


async def hash_of(platform: Platform, user: User) -> str | None:
    async with platform.pool.tenant(user.tenant_id) as tx:
        found: str | None = await tx.fetchval("SELECT password_hash FROM users WHERE id = $1", user.id)
    return found


async def owners(users: UserService, tenant_id: TenantId) -> list[User]:
    found = await users.list(tenant_id)
    return [user for user in found if user.role is Role.OWNER and user.status is UserStatus.ACTIVE]


async def test_a_user_is_added_changed_and_removed_and_each_step_is_audited(
    platform: Platform, users: UserService
) -> None:
    tenant, owner = await platform.new_tenant()
    added = await users.add(tenant.id, " Ada@Acme.example ", Role.MEMBER, PASSWORD, actor="me", request_id="r-1")
    assert (added.email, added.role, added.status) == ("ada@acme.example", Role.MEMBER, UserStatus.ACTIVE)
    stored = await hash_of(platform, added)
    assert stored is not None
    assert stored.startswith("$argon2id$")
    assert await verify_password(stored, PASSWORD)
    assert [user.id for user in await users.list(tenant.id)] == [owner.id, added.id]
    assert [user.id for user in await users.list(tenant.id, after=owner.id)] == [added.id]
    admin = await users.change_role(tenant.id, added.id, Role.ADMIN)
    assert await users.change_role(tenant.id, added.id, Role.ADMIN) == admin, "nothing changes, nothing is audited"
    assert (await users.disable(tenant.id, added.id)).status is UserStatus.DISABLED
    assert (await users.enable(tenant.id, added.id)) == admin
    await users.remove(tenant.id, added.id)
    with pytest.raises(NotFoundError):
        await users.remove(tenant.id, added.id)
    entries = await audit_of_users(platform, tenant.id)
    assert [entry["action"] for entry in entries] == [
        "user.added", "user.role-changed", "user.disabled", "user.enabled", "user.removed",
    ]  # fmt: skip
    assert (entries[0]["actor"], entries[0]["request_id"], entries[0]["before"]) == ("me", "r-1", None)
    assert (entries[1]["before"]["role"], entries[1]["after"]["role"]) == ("member", "admin")
    assert entries[4]["after"] is None
    assert "argon2" not in str(entries)


async def audit_of_users(platform: Platform, tenant_id: TenantId) -> list[dict[str, object]]:
    return [entry for entry in await audit_of(platform, tenant_id) if entry["action"].startswith("user.")]


async def test_an_address_is_unique_within_its_tenant_alone(platform: Platform, users: UserService) -> None:
    one, other = (await platform.new_tenant()).tenant, (await platform.new_tenant()).tenant
    await users.add(one.id, "ada@acme.example", Role.MEMBER, PASSWORD)
    await users.add(other.id, "ada@acme.example", Role.MEMBER, PASSWORD)
    with pytest.raises(ConflictError, match=r"ada@acme\.example already"):
        await users.add(one.id, "ADA@acme.example", Role.VIEWER, PASSWORD)
    with pytest.raises(ConflictError, match="who is active"):
        await users.invite(one.id, "ada@acme.example", Role.VIEWER)
    at_once = await asyncio.gather(
        *(users.add(one.id, "bob@acme.example", Role.VIEWER, PASSWORD) for _ in range(3)), return_exceptions=True
    )
    assert sorted(type(outcome).__name__ for outcome in at_once) == ["ConflictError", "ConflictError", "User"]


@pytest.mark.parametrize("email", ["", "ada", "@acme", "a@b@c", "a b@c", "a@b\n", "a@" + "b" * 253, "a\0@b"])
async def test_what_is_no_address_is_refused(platform: Platform, users: UserService, email: str) -> None:
    tenant = (await platform.new_tenant()).tenant
    with pytest.raises(InvalidRequestError, match="not an e-mail address"):
        await users.add(tenant.id, email.replace("\n", "\nx"), Role.MEMBER, PASSWORD)


async def test_an_invitation_is_accepted_once_and_the_latest_is_the_one(platform: Platform, users: UserService) -> None:
    tenant = (await platform.new_tenant()).tenant
    first = await users.invite(tenant.id, "ada@acme.example", Role.VIEWER)
    again = await users.invite(tenant.id, "ada@acme.example", Role.ADMIN)
    assert (again.user.id, again.user.role) == (first.user.id, Role.ADMIN)
    assert again.token not in repr(again)
    assert await hash_of(platform, again.user) is None
    other = (await platform.new_tenant()).tenant
    for wrong in ("", first.token, again.token + "x", again.token.replace(tenant.id, other.id), f"inv_{'-' * 36}_" * 2):
        with pytest.raises(InvitationError):
            await users.accept(wrong, PASSWORD)
    with pytest.raises(InvalidRequestError, match="8 to 1024"):
        await users.accept(again.token, "short")
    outcomes = await asyncio.gather(*(users.accept(again.token, PASSWORD) for _ in range(3)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InvitationError", "InvitationError", "User"]
    stored = await hash_of(platform, again.user)
    assert stored is not None
    assert await verify_password(stored, PASSWORD)
    entries = await audit_of_users(platform, tenant.id)
    assert [entry["action"] for entry in entries] == ["user.invited", "user.invited", "user.accepted"]
    assert entries[-1]["actor"] == f"user:{again.user.id}"
    assert again.token not in str(entries)


async def test_an_invitation_expires_or_is_taken_back(platform: Platform, users: UserService) -> None:
    tenant = (await platform.new_tenant()).tenant
    late = await users.invite(tenant.id, "late@acme.example", Role.MEMBER)
    async with platform.pool.tenant(tenant.id) as tx:
        await tx.execute("UPDATE users SET invitation_expires_at = now() WHERE id = $1", late.user.id)
    back = await users.invite(tenant.id, "back@acme.example", Role.MEMBER)
    with pytest.raises(ConflictError, match="only invited"):
        await users.disable(tenant.id, back.user.id)
    await users.remove(tenant.id, back.user.id)
    for invitation in (late, back):
        with pytest.raises(InvitationError):
            await users.accept(invitation.token, PASSWORD)


OwnerChange = Callable[[UserService, TenantId, str], Awaitable[object]]
LOSSES: dict[str, OwnerChange] = {
    "removed": lambda users, tenant, user: users.remove(tenant, user),
    "disabled": lambda users, tenant, user: users.disable(tenant, user),
    "demoted": lambda users, tenant, user: users.change_role(tenant, user, Role.ADMIN),
}


@pytest.mark.parametrize("lost", LOSSES)
async def test_the_last_active_owner_stays(platform: Platform, users: UserService, lost: str) -> None:
    created: CreatedTenant = await platform.new_tenant()
    tenant_id, owner_id = created.tenant.id, created.owner.id
    second = await users.add(tenant_id, "second@acme.example", Role.OWNER, PASSWORD)
    await users.disable(tenant_id, second.id)
    await users.invite(tenant_id, "third@acme.example", Role.OWNER)
    before = await users.list(tenant_id)
    with pytest.raises(ConflictError, match="last active owner"):
        await LOSSES[lost](users, tenant_id, owner_id)
    assert await users.list(tenant_id) == before, "nothing of it is left"
    await users.enable(tenant_id, second.id)
    await LOSSES[lost](users, tenant_id, owner_id)
    assert [owner.id for owner in await owners(users, tenant_id)] == [second.id]


@pytest.mark.parametrize("lost", LOSSES)
async def test_owners_who_end_each_other_at_once_leave_one(platform: Platform, users: UserService, lost: str) -> None:
    created = await platform.new_tenant()
    tenant_id = created.tenant.id
    ids = [created.owner.id]
    ids += [(await users.add(tenant_id, f"o{n}@acme.example", Role.OWNER, PASSWORD)).id for n in range(3)]
    outcomes = await asyncio.gather(*(LOSSES[lost](users, tenant_id, each) for each in ids), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if isinstance(outcome, Exception)] == [ConflictError]
    assert len(await owners(users, tenant_id)) == 1


async def test_users_of_nobody_of_another_and_of_the_deleted(platform: Platform, users: UserService) -> None:
    one, other = (await platform.new_tenant()), (await platform.new_tenant())
    with pytest.raises(NotFoundError):
        await users.change_role(one.tenant.id, other.owner.id, Role.ADMIN)
    for call in (users.list(TenantId(uuid7(1))), users.add(TenantId(uuid7(1)), "a@b.example", Role.OWNER, PASSWORD)):
        with pytest.raises(NotFoundError):
            await call
    with pytest.raises(InvalidRequestError, match="UUID"):
        await users.disable(one.tenant.id, "ada")
    invited = await users.invite(one.tenant.id, "late@acme.example", Role.MEMBER)
    await platform.tenants.delete(one.tenant.id)
    for change in (users.accept(invited.token, PASSWORD), users.disable(one.tenant.id, one.owner.id)):
        with pytest.raises(ConflictError, match="was deleted"):
            await change
