"""Custom domains: proven by the DNS, and counted by admission exactly as many times as there are verified ones."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from settler_streams.adapters.dns_txt import DnsTxtRecords
from settler_streams.errors import ConflictError, InvalidRequestError, NotFoundError, UnavailableError
from settler_streams.events import QuotaType, Resource, TenantTier, TenantUsage, UsageRecorded
from settler_streams.ids import TenantId, uuid7
from settler_streams.services import (
    Domain,
    DomainNotProvenError,
    DomainService,
    DomainStatus,
    OutboxRelay,
    QuotaExceededError,
    Tenant,
)
from settler_streams.services.feed import TopicFeed
from settler_streams.services.publisher import Encoded
from tests.services_layer.dns_server import DnsServer
from tests.services_layer.platform import SETTLED_WITHIN_S, Platform, settled
from tests.services_layer.test_tenant_life import audit_of

pytestmark = pytest.mark.services


@pytest_asyncio.fixture
async def server() -> AsyncIterator[DnsServer]:
    async with DnsServer.listening() as server:
        yield server


@pytest.fixture
def domains(platform: Platform, server: DnsServer) -> DomainService:
    return DomainService(platform.pool, DnsTxtRecords(server.address), platform.relay)


async def new_tenant(platform: Platform, domains_max: int = 100, **more: object) -> Tenant:
    return (await platform.new_tenant(quotas={QuotaType.CUSTOM_DOMAINS: domains_max}, **more)).tenant  # type: ignore[arg-type]


def prove(server: DnsServer, *proven: Domain) -> None:
    for domain in proven:
        server.records[domain.record_name] = [domain.record_value]


async def waiting(platform: Platform) -> int:
    async with platform.pool.relay() as tx:
        return int(await tx.fetchval("SELECT count(*) FROM outbox"))


async def report(platform: Platform, tenant: Tenant, used: int) -> None:
    """What the recorder writes of a usage report."""
    async with platform.pool.tenant(tenant.id) as tx:
        await tx.execute(
            "INSERT INTO tenant_quota_usage (tenant_id, quota_type, used, source_version) VALUES ($1, $2, $3, 1) "
            "ON CONFLICT (tenant_id, quota_type) DO UPDATE SET used = excluded.used",
            tenant.id, QuotaType.CUSTOM_DOMAINS.value, used,
        )  # fmt: skip


_MARKERS = itertools.count()


async def counted(platform: Platform, tenant: Tenant) -> int:
    """How many domains admission counts for the tenant, once it has seen everything that is in the outbox by now.

    A report may be of a moment before that; the one that tells has what a marker behind all events adds, which is more
    than all markers before it together.
    """
    weight = 1 << next(_MARKERS)
    async with asyncio.timeout(SETTLED_WITHIN_S):
        while await waiting(platform):  # a relay at work has the events until they are acknowledged
            await platform.relay.publish_pending()
    reported: list[TenantUsage] = []
    signals = TopicFeed(
        platform.settings, "tenant-signals",
        lambda e: reported.append(e.data) if e.tenantid == tenant.id and isinstance(e.data, TenantUsage) else None,
        start="end",
    )  # fmt: skip
    await signals.start()
    try:
        marker = UsageRecorded(resource=Resource.STORAGE_BYTES, quantity=weight)  # behind them, in the same partition
        await platform.publisher.publish("usage-events", tenant.id, tenant.root_id, marker)
        await settled(signals, lambda: bool(reported) and reported[-1].used[Resource.STORAGE_BYTES] >= weight)
    finally:
        await signals.stop()
    return reported[-1].used[Resource.CUSTOM_DOMAINS]


async def test_a_domain_is_added_proven_counted_and_removed(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    tenant = await new_tenant(platform)
    added = await domains.add(tenant.id, " App.Acme.example. ", actor="me", request_id="r-1")
    assert (added.domain, added.status) == ("app.acme.example", DomainStatus.PENDING)
    assert added.record_name == "_settler-challenge.app.acme.example"
    assert await counted(platform, tenant) == 0
    prove(server, added)
    verified = await domains.verify(tenant.id, added.id)
    assert verified.status is DomainStatus.VERIFIED
    assert await domains.list(tenant.id) == [verified]
    assert await counted(platform, tenant) == 1
    asked = len(server.asked)
    assert await domains.verify(tenant.id, added.id) == verified
    assert len(server.asked) == asked, "what is verified is not asked for again"
    await domains.remove(tenant.id, added.id)
    assert await counted(platform, tenant) == 0
    assert await domains.list(tenant.id) == []
    with pytest.raises(NotFoundError):
        await domains.remove(tenant.id, added.id)
    entries = (await audit_of(platform, tenant.id))[1:]
    assert [entry["action"] for entry in entries] == ["domain.added", "domain.verified", "domain.removed"]
    assert (entries[0]["actor"], entries[0]["request_id"], entries[0]["before"]) == ("me", "r-1", None)
    assert (entries[1]["before"]["status"], entries[1]["after"]["status"]) == ("pending", "verified")
    assert added.token not in str(entries)


async def test_a_domain_is_not_proven_by_another_record(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    tenant, other = await new_tenant(platform), await new_tenant(platform)
    mine, theirs = await domains.add(tenant.id, "acme.example"), await domains.add(other.id, "acme.example")
    for found in ([], ["v=spf1"], [theirs.record_value], [mine.token], [mine.record_value + "x"]):
        server.records[mine.record_name] = [f'"{text}"' for text in found]
        with pytest.raises(DomainNotProvenError, match=f"of {len(found)} TXT records"):
            await domains.verify(tenant.id, mine.id)
    del server.records[mine.record_name]
    with pytest.raises(DomainNotProvenError, match="of 0 TXT"):
        await domains.verify(tenant.id, mine.id)
    server.failing = True
    with pytest.raises(UnavailableError):
        await domains.verify(tenant.id, mine.id)
    server.failing = False
    server.records[mine.record_name] = ['"v=spf1"', f'"{theirs.record_value}"', f'"{mine.record_value}"']
    for service, domain in ((tenant, mine), (other, theirs)):
        assert (await domains.verify(service.id, domain.id)).status is DomainStatus.VERIFIED


async def test_a_resolver_that_is_silent_is_waited_for_a_bounded_time(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("settler_streams.adapters.dns_txt.ANSWERED_WITHIN_S", 0.3)
    tenant = await new_tenant(platform)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        domains = DomainService(platform.pool, DnsTxtRecords(f"127.0.0.1:{silent.getsockname()[1]}"), platform.relay)
        added = await domains.add(tenant.id, "acme.example")
        with pytest.raises(UnavailableError, match="no answer about _settler-challenge"):
            await domains.verify(tenant.id, added.id)


async def test_every_verified_domain_counts_once_however_often_and_at_once_it_is_asked_for(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    parent = await new_tenant(platform)
    tenant = await new_tenant(platform, parent_id=parent.id)
    added = [await domains.add(tenant.id, f"d{n}.acme.example") for n in range(6)]
    prove(server, *added)
    await asyncio.gather(*(domains.verify(tenant.id, domain.id) for domain in added for _ in range(3)))
    assert await counted(platform, tenant) == 6
    removals = [domains.remove(tenant.id, domain.id) for domain in added[:4] for _ in range(3)]
    outcomes = await asyncio.gather(*removals, return_exceptions=True)
    assert [outcome for outcome in outcomes if outcome is None] == [None] * 4
    assert all(isinstance(outcome, NotFoundError) for outcome in outcomes if outcome is not None)
    assert await counted(platform, tenant) == 2
    assert await counted(platform, parent) == 2
    more = [await domains.add(tenant.id, f"e{n}.acme.example") for n in range(4)]
    prove(server, *more)
    mixed = [call(tenant.id, domain.id) for domain in more for call in (domains.verify, domains.remove)]
    await asyncio.gather(*mixed, return_exceptions=True)
    left = [domain for domain in await domains.list(tenant.id) if domain.status is DomainStatus.VERIFIED]
    assert await counted(platform, tenant) == len(left) == 2, "whoever was verified and removed counts no more"


async def test_a_relay_that_publishes_again_counts_nothing_twice(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    class DiesAfterwards:
        async def publish_encoded(self, events: list[Encoded]) -> None:
            await platform.publisher.publish_encoded(events)
            raise UnavailableError("died")

    tenant = await new_tenant(platform)
    added = [await domains.add(tenant.id, f"d{n}.acme.example") for n in range(2)]
    prove(server, *added)
    await platform.relay.stop()
    try:
        for domain in added:
            await domains.verify(tenant.id, domain.id)
        await domains.remove(tenant.id, added[0].id)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await OutboxRelay(platform.pool, DiesAfterwards()).publish_pending()  # type: ignore[arg-type]
        assert await counted(platform, tenant) == 1
    finally:
        await platform.relay.start()


async def test_the_quota_holds_for_all_who_add_at_once(platform: Platform, domains: DomainService) -> None:
    tenant = await new_tenant(platform, domains_max=3)
    outcomes = await asyncio.gather(
        *(domains.add(tenant.id, f"d{n}.acme.example") for n in range(8)), return_exceptions=True
    )
    added = [outcome for outcome in outcomes if isinstance(outcome, Domain)]
    assert len(added) == 3
    refused = [outcome for outcome in outcomes if isinstance(outcome, QuotaExceededError)]
    assert len(refused) == 5
    assert {(error.current_usage, error.limit) for error in refused} == {(3, 3)}
    await domains.remove(tenant.id, added[0].id)
    await domains.add(tenant.id, "d9.acme.example")


async def test_a_parent_without_room_refuses_and_an_enterprise_has_no_limit(
    platform: Platform, domains: DomainService
) -> None:
    parent = await new_tenant(platform, domains_max=0)
    child = await new_tenant(platform, parent_id=parent.id)
    with pytest.raises(QuotaExceededError) as caught:
        await domains.add(child.id, "acme.example")
    assert (caught.value.current_usage, caught.value.limit) == (0, 0)
    assert await domains.list(child.id) == []
    large = await new_tenant(platform, domains_max=0, tier=TenantTier.ENTERPRISE)
    await domains.add(large.id, "acme.example")


async def test_a_domain_is_verified_only_while_its_parents_have_room(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    """A parent's limit is held against its last usage report, which is written here as the recorder would later."""
    top = await new_tenant(platform, domains_max=2)
    parent = await new_tenant(platform, parent_id=top.id)
    child = await new_tenant(platform, parent_id=parent.id)
    added = [await domains.add(child.id, f"d{n}.acme.example") for n in range(4)]
    prove(server, *added)
    for n, domain in enumerate(added[:2]):
        await report(platform, top, n)
        assert (await domains.verify(child.id, domain.id)).status is DomainStatus.VERIFIED
    await report(platform, top, 2)
    for domain in added[2:]:
        with pytest.raises(QuotaExceededError) as caught:
            await domains.verify(child.id, domain.id)
        assert (caught.value.current_usage, caught.value.limit) == (2, 2)
    assert await domains.verify(child.id, added[0].id), "what is verified stays so"
    assert [domain.status for domain in await domains.list(child.id)] == ["verified"] * 2 + ["pending"] * 2
    assert await counted(platform, child) == 2
    await domains.remove(child.id, added[0].id)
    await report(platform, top, 1)
    assert (await domains.verify(child.id, added[2].id)).status is DomainStatus.VERIFIED


async def test_an_enterprise_child_is_verified_without_room_above(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    parent = await new_tenant(platform, domains_max=0)
    child = await new_tenant(platform, domains_max=0, tier=TenantTier.ENTERPRISE, parent_id=parent.id)
    added = await domains.add(child.id, "acme.example")
    prove(server, added)
    assert (await domains.verify(child.id, added.id)).status is DomainStatus.VERIFIED


@pytest.mark.parametrize(
    "wrong", ["", "acme", "-a.example", "a-.example", "a..example", "a_b.example", "ä.example", "1.2.3.4",
              "a" * 64 + ".de", "a." * 116 + "example"]
)  # fmt: skip
async def test_what_is_no_domain_is_refused(platform: Platform, domains: DomainService, wrong: str) -> None:
    with pytest.raises(InvalidRequestError, match="not a domain name"):
        await domains.add(TenantId(uuid7(1)), wrong)


async def test_domains_of_nobody_twice_and_of_the_deleted(
    platform: Platform, domains: DomainService, server: DnsServer
) -> None:
    tenant, other = await new_tenant(platform), await new_tenant(platform)
    added = await domains.add(tenant.id, "acme.example")
    second = await domains.add(tenant.id, "xn--mnchen-3ya.example")
    assert await domains.list(tenant.id, limit=1) == [added]
    assert await domains.list(tenant.id, after=added.id) == [second]
    with pytest.raises(ConflictError, match=r"acme\.example already"):
        await domains.add(tenant.id, "ACME.example")
    for call in (
        domains.verify(other.id, added.id), domains.remove(other.id, added.id),
        domains.list(TenantId(uuid7(1))), domains.add(TenantId(uuid7(1)), "acme.example"),
    ):  # fmt: skip
        with pytest.raises(NotFoundError):
            await call
    prove(server, added)
    await platform.tenants.delete(tenant.id)
    for call in (domains.verify(tenant.id, added.id), domains.remove(tenant.id, added.id)):
        with pytest.raises(ConflictError, match="was deleted"):
            await call
