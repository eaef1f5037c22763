"""``settler tenants`` against real services: a tenant's whole life, each step as another program would read it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from settler_streams.adapters.kafka import stopping
from settler_streams.services import AuthenticationError, EventPublisher, verify_password
from settler_streams.services import publisher as publisher_module
from settler_streams.services.publisher import Encoded
from settler_streams.topology import full_name
from tests.cli.in_process import invoke, shown
from tests.services.interface import Service
from tests.services_layer.dns_server import DnsServer
from tests.services_layer.platform import Platform
from tests.services_layer.test_tenant_backups import remove
from tests.services_layer.test_tenant_life import audit_of

pytestmark = pytest.mark.services

ENDS_WITHIN_S = 100
REFUSED = 4
Cli = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
def cli(platform: Platform, tmp_path: Path) -> Cli:
    """Runs ``settler tenants …`` in a thread and gives its exit code and its JSON, or the error that is printed."""
    known = {**platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path)}

    async def run(*arguments: str, given: str = "", **environment: str) -> tuple[int, Any]:
        async with asyncio.timeout(ENDS_WITHIN_S):
            code, printed, error = await asyncio.to_thread(
                invoke, ["tenants", *arguments], {**known, **environment}, given
            )
        return code, error if printed is None else printed

    return run


async def done(cli: Cli, *arguments: str, **more: str) -> Any:
    code, printed = await cli(*arguments, **more)
    assert code == 0, printed
    return printed


async def new_tenant(cli: Cli, *more: str) -> dict[str, Any]:
    token = secrets.token_hex(6)
    created: dict[str, Any] = await done(
        cli, "create", "--name", "Acme", "--slug", f"t-{token}", "--owner-email", "o@acme.example",
        "--owner-password", "correct horse", *more,
    )  # fmt: skip
    return created


async def test_a_tenant_is_renamed_suspended_deleted_and_restored(cli: Cli, platform: Platform) -> None:
    parent = (await new_tenant(cli))["id"]
    child = (await new_tenant(cli, "--parent", parent))["id"]
    assert [each["id"] for each in await done(cli, "children", parent)] == [child]
    assert (await done(cli, "rename", child, "Acme & Co"))["name"] == "Acme & Co"
    assert (await done(cli, "suspend", child))["status"] == "suspended"
    assert (await done(cli, "reactivate", child))["status"] == "active"
    code, said = await cli("delete", parent)
    assert (code, "delete that first" in said) == (REFUSED, True)
    assert (await done(cli, "delete", child))["erase_after"] is not None
    assert await done(cli, "erasable") == []
    assert (await done(cli, "restore", child))["status"] == "active"
    await done(cli, "delete", child, "--grace-days", "0")
    assert [each["id"] for each in await done(cli, "erasable")] == [child]
    assert (await cli("restore", child))[0] == REFUSED
    assert (await done(cli, "show", child))["status"] == "deleted"
    assert {entry["actor"] for entry in await audit_of(platform, child)} == {"cli"}


async def test_a_backup_is_restored_once_the_tenant_is_gone(cli: Cli, platform: Platform, tmp_path: Path) -> None:
    tenant, backup = (await new_tenant(cli))["id"], str(tmp_path / "backup")
    exported = await done(cli, "export", tenant, backup, "--secrets")
    code, said = await cli("restore-backup", backup)
    assert (code, f"something of tenant {tenant} is there" in said) == (REFUSED, True)
    await remove(platform.settings, tenant)
    rows = sum(file["lines"] for file in exported["files"] if file["path"].startswith("tables/"))
    restored = await done(cli, "restore-backup", backup)
    assert restored == {"tenant_id": tenant, "version": 2, "rows": rows, "files": 0}
    assert (await done(cli, "show", tenant))["version"] == 2
    assert {entry["actor"] for entry in await audit_of(platform, tenant)} == {"cli"}


async def test_a_configuration_is_read_and_written(cli: Cli, tmp_path: Path) -> None:
    tenant = (await new_tenant(cli))["id"]
    assert await done(cli, "config", "show", tenant) == {"version": 1, "config": {}}
    file = tmp_path / "config.json"
    file.write_text('{"locale": "dé"}')
    changed = {"version": 2, "config": {"locale": "dé"}}
    assert await done(cli, "config", "set", tenant, str(file), "--if-version", "1") == changed
    code, said = await cli("config", "set", tenant, "-", "--if-version", "1", given="{}")
    assert (code, "has version 2" in said) == (REFUSED, True)
    for wrong, why in (("[]", "a JSON object"), ("{", "is not JSON")):
        code, said = await cli("config", "set", tenant, "-", given=wrong)
        assert (code, why in said) == (REFUSED, True)
    assert await done(cli, "config", "show", tenant) == changed


async def test_users_come_change_and_go(cli: Cli, platform: Platform) -> None:
    tenant = (await new_tenant(cli))["id"]
    (owner,) = await done(cli, "users", "list", tenant)
    code, said = await cli("users", "disable", tenant, owner["id"])
    assert (code, "last active owner" in said) == (REFUSED, True)
    added = await done(cli, "users", "add", tenant, "ada@acme.example", "owner", SETTLER_USER_PASSWORD="a password")
    assert (await done(cli, "users", "role", tenant, owner["id"], "viewer"))["role"] == "viewer"
    assert (await done(cli, "users", "disable", tenant, owner["id"]))["status"] == "disabled"
    assert (await done(cli, "users", "enable", tenant, owner["id"]))["status"] == "active"
    assert await done(cli, "users", "remove", tenant, owner["id"]) == {"removed": owner["id"]}
    invited = await done(cli, "users", "invite", tenant, "bob@acme.example", "member")
    accepted = await done(
        cli, "users", "accept", SETTLER_INVITATION_TOKEN=invited["token"], SETTLER_USER_PASSWORD="bob's password"
    )
    assert (accepted["id"], accepted["status"]) == (invited["id"], "active")
    listed = await done(cli, "users", "list", tenant)
    assert [user["id"] for user in listed] == [added["id"], invited["id"]]
    assert await done(cli, "users", "list", tenant, "--after", added["id"]) == listed[1:]
    assert await done(cli, "users", "list", tenant, "--limit", "1") == listed[:1]
    async with platform.pool.tenant(tenant) as tx:
        stored = await tx.fetchval("SELECT password_hash FROM users WHERE email = 'bob@acme.example'")
    assert await verify_password(stored, "bob's password")


async def test_keys_are_issued_narrowed_rotated_and_revoked(cli: Cli, platform: Platform) -> None:
    tenant = (await new_tenant(cli))["id"]
    plain = (await done(cli, "key", tenant))["key"]
    issued = await done(cli, "keys", "issue", tenant, "--scope", "jobs:read", "--name", "reader", "--days", "9")
    await done(cli, "keys", "scopes", tenant, issued["id"], "--scope", "flags:read")
    assert (await platform.tenants.authenticate(issued["key"])).scopes == {"flags:read"}
    assert (await done(cli, "keys", "expiry", tenant, issued["id"], "--days", "3"))["expires_at"] < issued["expires_at"]
    assert (await done(cli, "keys", "expiry", tenant, issued["id"], "--never"))["expires_at"] is None
    replaced = await done(cli, "keys", "rotate", tenant, issued["id"], "--overlap-hours", "1")
    for each in (plain, issued["key"], replaced["key"]):
        await platform.tenants.authenticate(each)
    assert await done(cli, "keys", "revoke", tenant, issued["id"]) == {"revoked": issued["id"]}
    with pytest.raises(AuthenticationError):
        await platform.tenants.authenticate(issued["key"])
    listed = await done(cli, "keys", "list", tenant)
    assert [(key["name"], key["in_force"]) for key in listed] == [
        ("default", True), ("reader", False), ("reader", True),
    ]  # fmt: skip
    assert (await cli("keys", "revoke", tenant, issued["id"]))[0] == REFUSED


async def test_a_narrow_terminal_shows_secrets_whole_and_ids_in_one_line(
    cli: Cli, platform: Platform, tmp_path: Path
) -> None:
    tenant = (await new_tenant(cli))["id"]
    known = {
        **platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path), "WEBHOOK_KEYS": f"one:{'a1' * 32}",
        "TTY_COMPATIBLE": "1", "COLUMNS": "80",
    }  # fmt: skip

    async def lines(*arguments: str) -> list[str]:
        async with asyncio.timeout(ENDS_WITHIN_S):
            return (await asyncio.to_thread(shown, ["tenants", *arguments], known)).splitlines()

    issued = await lines("keys", "issue", tenant)
    assert (await platform.tenants.authenticate(issued[0])).tenant_id == tenant
    (reader,) = (key for key in await done(cli, "keys", "list", tenant))
    rotated = await lines("keys", "rotate", tenant, reader["id"])
    assert (await platform.tenants.authenticate(rotated[0])).tenant_id == tenant
    for listed in ("keys", "users"):
        ids = [each["id"] for each in await done(cli, listed, "list", tenant)]
        printed = await lines(listed, "list", tenant)
        assert [line.split()[0] for line in printed if line[:1] not in ("", " ", "\x1b")] == ids
    token = (await lines("users", "invite", tenant, "bob@acme.example", "member"))[0]
    await done(cli, "users", "accept", SETTLER_INVITATION_TOKEN=token, SETTLER_USER_PASSWORD="bob's password")
    added = await lines("webhooks", "add", tenant, "https://hooks.example/")
    (webhook,) = await done(cli, "webhooks", "list", tenant)
    again = await lines("webhooks", "rotate", tenant, webhook["id"])
    for secret in (added[0], again[0]):
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32


async def test_a_domain_is_proven_and_onboarding_sees_it(cli: Cli, platform: Platform) -> None:
    tenant = (await new_tenant(cli, "--tier", "enterprise"))["id"]
    before = await done(cli, "onboarding", tenant)
    assert before == {
        "done": False, "next": "api-key",
        "steps": {"owner": True, "api-key": False, "domain-or-webhook": False, "first-job": False},
    }  # fmt: skip
    added = await done(cli, "domains", "add", tenant, "app.acme.example")
    assert (added["record_type"], added["record_name"]) == ("TXT", "_settler-challenge.app.acme.example")
    async with DnsServer.listening() as server:
        code, said = await cli("domains", "verify", tenant, added["id"], DNS_NAMESERVERS=server.address)
        assert (code, added["record_value"] in said) == (REFUSED, True)
        server.records[added["record_name"]] = [added["record_value"]]
        verified = await done(cli, "domains", "verify", tenant, added["id"], DNS_NAMESERVERS=server.address)
    assert verified["status"] == "verified"
    assert await done(cli, "domains", "list", tenant) == [verified]
    assert (await done(cli, "onboarding", tenant))["steps"]["domain-or-webhook"] is True
    assert await done(cli, "domains", "remove", tenant, added["id"]) == {"removed": added["id"]}
    assert await done(cli, "domains", "list", tenant) == []
    starter = (await new_tenant(cli, "--tier", "free"))["id"]
    code, said = await cli("domains", "add", starter, "app.acme.example")
    assert (code, "quota custom_domains exceeded: 0 of 0 used" in said) == (REFUSED, True)


async def test_what_is_no_id_and_who_is_nobody_are_refused(cli: Cli) -> None:
    nobody = "0190a1b2-c3d4-7e5f-8a6b-9c0d1e2f3a4b"
    for arguments in (
        ("users", "list"), ("keys", "list"), ("domains", "list"), ("onboarding",), ("config", "show"), ("delete",),
    ):  # fmt: skip
        code, said = await cli(*arguments, nobody)
        assert (code, f"no tenant {nobody}" in said) == (REFUSED, True), arguments
    code, said = await cli("users", "list", "acme")
    assert (code, "not a tenant id" in said or "badly formed" in said) == (REFUSED, True)


async def test_without_kafka_a_change_is_stored_and_shown_and_who_tells_it_is_said(
    cli: Cli, platform: Platform, tmp_path: Path
) -> None:
    tenant = (await new_tenant(cli))["id"]
    known = {**platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path)}
    without = {**known, "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    async with asyncio.timeout(ENDS_WITHIN_S):
        code, issued, said = await asyncio.to_thread(invoke, ["tenants", "key", tenant], without)
    assert (code, "stored; a gateway, or the next command" in said) == (0, True)
    assert (await platform.tenants.authenticate(issued["key"])).tenant_id == tenant
    await done(cli, "rename", tenant, "Acme again")  # waits for admission, which has heard of the key before
    assert (await done(cli, "show", tenant))["version"] == 3


async def test_a_key_is_shown_when_kafka_cannot_even_be_asked(cli: Cli, platform: Platform, tmp_path: Path) -> None:
    tenant = (await new_tenant(cli))["id"]
    without = {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CA_FILE": str(tmp_path / "absent.pem")}
    issued = await done(cli, "key", tenant, **without)
    assert (await platform.tenants.authenticate(issued["key"])).tenant_id == tenant


async def test_a_key_is_shown_when_kafka_hangs_once_the_command_is_connected(
    cli: Cli, platform: Platform, kafka: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = (await new_tenant(cli))["id"]
    known = {**platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path)}
    publish = EventPublisher.publish_encoded

    async def publish_into_silence(publisher: EventPublisher, events: Sequence[Encoded]) -> None:
        assert publisher._producer is not None
        assert publisher._producer._producer is not None
        for event in events:
            await publisher._producer._producer.partitions_for(full_name(platform.settings.deployment, event.topic))
        kafka.pause()
        await publish(publisher, events)

    await platform.relay.stop()  # the command publishes by itself
    try:
        with monkeypatch.context() as patched:
            patched.setattr(EventPublisher, "publish_encoded", publish_into_silence)
            patched.setattr(publisher_module, "PUBLISH_DEADLINE_S", 0.5)
            patched.setattr(stopping, "DELIVERY_DEADLINE_S", 0.5)
            async with asyncio.timeout(ENDS_WITHIN_S):
                code, issued, said = await asyncio.to_thread(invoke, ["tenants", "key", tenant], known)
    finally:
        kafka.resume()
        await platform.relay.start()
    assert (code, "it is unknown whether the event was stored" in said) == (0, True)
    assert (await platform.tenants.authenticate(issued["key"])).tenant_id == tenant
    assert (await done(cli, "rename", tenant, "Acme again"))["version"] == 3  # the outbox still had the key's event


async def test_a_key_is_shown_when_its_command_is_interrupted_while_kafka_hangs(
    cli: Cli, platform: Platform, kafka: Service, tmp_path: Path
) -> None:
    tenant = (await new_tenant(cli))["id"]
    known = {**os.environ, **platform.settings.environment(), "SETTLER_STATE_DIR": str(tmp_path)}
    kafka.pause()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "settler_streams.cli.main", "tenants", "key", tenant, "--json",
            env=known, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        broker = platform.settings.kafka_bootstrap_servers.rpartition(":")[2]
        async with asyncio.timeout(ENDS_WITHIN_S):
            while not reaches(process.pid, int(broker)):  # noqa: ASYNC110 - it tells nobody; the change is stored by then
                await asyncio.sleep(0)
            process.send_signal(signal.SIGINT)
            printed, said = await process.communicate()
    finally:
        kafka.resume()
    assert (process.returncode, b"stored; a gateway" in said) == (0, True), said
    assert (await platform.tenants.authenticate(json.loads(printed)["key"])).tenant_id == tenant


def reaches(pid: int, port: int) -> bool:
    """Whether a process has a connection to this port."""
    return any(each.raddr and each.raddr.port == port for each in psutil.Process(pid).net_connections("tcp"))
