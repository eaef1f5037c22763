"""The field: a deployment on its own stack, its processes behind their proxies, its tenants, and their load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import asyncpg

from settler_streams.dev.stack import PartName, ports
from settler_streams.dev.system import prepare
from settler_streams.events import QuotaType, TenantTier
from settler_streams.ids import TenantId
from settler_streams.services import TenantService, acknowledgements, hash_password
from settler_streams.settings import Settings
from tests.chaos import checker
from tests.chaos.fleet import Fleet
from tests.chaos.http_load import HttpLoad
from tests.chaos.load import Load, Tenant
from tests.chaos.pace import elapse, observe
from tests.chaos.proxied_stack import HOST, ProxiedStack
from tests.chaos.proxy import Proxy
from tests.chaos.recording import read_positions
from tests.chaos.watch import Watch

WORKERS = ("worker-1", "worker-2", "worker-3")
EXECUTORS = ("executor-1", "executor-2")
MEMBERS = (*WORKERS, *EXECUTORS, "gateway", "recorder")
SESSION_S = 3.0
"""Ten in production: three let more faults fit into a round, and a busy machine still keeps its heartbeats."""
SAMPLE_INTERVAL_S = 1.0
READY_S_MAX = 150.0
"""A worker joins seven consumer groups; on two busy cores that has taken half a minute."""
CALL_S_MAX = 20.0


@dataclass(frozen=True)
class Planned:
    """A tenant to be made: its tier, its own limits, its load per second, and whose child it is."""

    name: str
    tier: TenantTier
    requests: float
    usage: float = 0.5
    flags: float = 0.1
    quotas: dict[QuotaType, int] = field(default_factory=dict)
    parent: str | None = None


TENANTS = (
    Planned("enterprise", TenantTier.ENTERPRISE, 1, usage=2),
    Planned("scale", TenantTier.SCALE, 1, usage=2, flags=0.3),
    Planned("few-at-once", TenantTier.GROWTH, 4, quotas={QuotaType.CONCURRENT_JOBS: 2}),
    Planned("few-a-month", TenantTier.GROWTH, 5, quotas={QuotaType.MONTHLY_RECONCILIATIONS: 100}),
    Planned("parent", TenantTier.GROWTH, 0.5, quotas={QuotaType.CONCURRENT_JOBS: 3}),
    Planned("child-1", TenantTier.SCALE, 2, parent="parent"),
    Planned("child-2", TenantTier.STARTER, 1, parent="parent"),
    Planned("starter", TenantTier.STARTER, 0.5),
    Planned("free", TenantTier.FREE, 10),
    Planned("idle", TenantTier.FREE, 0.1),
    Planned("changing", TenantTier.STARTER, 2, quotas={QuotaType.CONCURRENT_JOBS: 3}),
    Planned("over-http", TenantTier.SCALE, 0),
)
"""About thirty requests a second, of which the limits let a third pass: a disturbed machine runs few jobs."""
HTTP_PER_S = 1.0
FEW_JOBS = ("few-at-once", "few-a-month", "free", "idle", "over-http")
"""Tenants that send much and have few jobs done: for rounds that look at decisions and have no time for executors."""


class Field:
    """Everything of one round. Use it as an asynchronous context."""

    def __init__(
        self, deployment: str, seed: int, stack: ProxiedStack, *, mutant: str = "", few_jobs: bool = False
    ) -> None:
        self.deployment = deployment
        self.seed = seed
        self.stack = stack
        self.injected: Counter[str] = Counter()
        self.positions: list[dict[tuple[str, str, int], int]] = []
        self.tenants: dict[str, Tenant] = {}
        self._mutant = mutant
        self._planned = [planned for planned in TENANTS if not few_jobs or planned.name in FEW_JOBS]
        self._stop = asyncio.Event()
        self._turn = asyncio.Lock()
        services: tuple[PartName, ...] = ("kafka", "postgres", "valkey")
        self.struck = {service: asyncio.Lock() for service in services}
        """Held while a fault is at that service."""
        self._calm = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._loads: list[asyncio.Task[None]] = []
        self.fleet: Fleet = None  # type: ignore[assignment] - there is one from the start on
        self.watch: Watch = None  # type: ignore[assignment]
        self.kafka: dict[str, Proxy] = {}
        self.postgres: dict[str, Proxy] = {}

    async def __aenter__(self) -> Field:
        try:
            await self._set_up()
        except BaseException:
            await self._clear_up()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._clear_up()

    async def _set_up(self) -> None:
        base = self.stack.settings
        self.settings = base.model_copy(
            update={"deployment": self.deployment, "db_name": self.deployment.replace("-", "_")}
        )
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.deployment}-"))
        await self._create_database()
        await prepare(self.settings)
        await self._open_doors()
        self.watch = Watch(self.settings, checker.topics(), checker.fold_inputs())
        await self.watch.start()
        self._start_members()
        await self._work_begins()
        await self._create_tenants()
        partitions = checker.topics()["job-requests"]
        self.load = Load(self.settings, list(self.tenants.values()), partitions, self.seed)
        self.http = HttpLoad(f"http://{HOST}:{self._gateway_port}", self._api_key, HTTP_PER_S, self.seed)
        self._loads = [
            asyncio.create_task(self.load.run(self._stop)), asyncio.create_task(self.http.run(self._stop)),
        ]  # fmt: skip
        self._tasks.append(asyncio.create_task(self._sample()))

    async def _clear_up(self) -> None:
        self._stop.set()
        self._calm.set()
        if self.fleet is not None:
            await self.fleet.close()
        for task in [*self._tasks, *self._loads]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loads, return_exceptions=True)
        if self.watch is not None:
            await self.watch.stop()
        await asyncio.gather(*(proxy.stop() for proxy in [*self.kafka.values(), *self.postgres.values()]))

    async def _work_begins(self) -> None:
        """Wait until every partition of admission has read a tick: then it will see the tenants."""
        ticks = checker.topics()["clock-ticks"]

        async def ticking() -> bool:
            return len([place for place in self.watch.ticks if place[0] == "clock-ticks"]) == ticks

        await observe("a tick in every partition", ticking, READY_S_MAX)

    async def owner(self) -> asyncpg.Connection:
        """A connection of the superuser, past every proxy and policy."""
        return await asyncpg.connect(self.settings.postgres_url(owner=True), timeout=CALL_S_MAX, command_timeout=60)

    async def stop_load(self) -> None:
        """No more requests; what was sent gets its answer from the broker."""
        self._stop.set()
        await asyncio.gather(*self._loads)

    async def bring_up(self, part: PartName) -> None:
        """Start a service again; one at a time, since the stack notes each down."""
        async with self._turn:
            await asyncio.to_thread(self.stack.up, {part})

    def partitions_under_load(self) -> set[int]:
        """Where decisions are to be expected at any time."""
        return {
            sent.partition
            for sent in self.load.ledger.values()
            if sent.topic == "job-requests" and sent.kind == "plain"
        }

    async def _create_database(self) -> None:
        url = self.settings.model_copy(update={"db_name": "postgres"}).postgres_url(owner=True)
        connection = await asyncpg.connect(url, timeout=CALL_S_MAX)
        try:
            await connection.execute(f'CREATE DATABASE "{self.settings.db_name}"')
        finally:
            await connection.close()

    async def _open_doors(self) -> None:
        taken = [port for door in self.stack.doors.values() for port in door]
        for name, door in self.stack.doors.items():
            self.kafka[name] = Proxy(f"kafka of {name}", door.proxy_port, door.broker_port)
            port = ports.free_port(taken=taken)
            taken.append(port)
            self.postgres[name] = Proxy(f"postgres of {name}", port, self.settings.db_port)
        await asyncio.gather(*(proxy.start() for proxy in [*self.kafka.values(), *self.postgres.values()]))
        self._gateway_port = ports.free_port(taken=taken)

    def environ_of(self, name: str) -> dict[str, str]:
        """The settings of one process: it reaches Kafka and Postgres through proxies of its own."""
        given: Settings = self.settings.model_copy(
            update={
                "kafka_bootstrap_servers": f"{HOST}:{self.kafka[name].port}",
                "db_port": self.postgres[name].port,
                "gateway_port": self._gateway_port,
                "data_dir": self.folder,
                "metrics_port": 0,
            }
        )
        return given.environment()

    def _start_members(self) -> None:
        self.fleet = Fleet(self.folder, {}, session_s=SESSION_S, mutant=self._mutant)
        for name in WORKERS:
            self.fleet.add(name, ["worker"], self.environ_of(name))
        for name in EXECUTORS:
            self.fleet.add(name, ["executor", "--name", name], self.environ_of(name))
        self.fleet.add("gateway", ["gateway"], self.environ_of("gateway"))

    def start_recorder(self) -> None:
        """A worker for projections alone: it ends what the others left when no fold writes any more."""
        self.fleet.add("recorder", ["worker", "--roles", "recorder,webhooks,dead-letters"], self.environ_of("recorder"))

    async def _create_tenants(self) -> None:
        """Through the tenant service, which returns once admission knows them: so the fleet runs already.

        Workers are still joining, and a rebalance may last longer than the service keeps a caller waiting otherwise.
        """
        password = await hash_password("chaos-password")
        patience = mock.patch.object(acknowledgements, "ACKNOWLEDGED_WITHIN_S", READY_S_MAX)
        async with TenantService.connect(self.settings) as service:
            for planned in self._planned:
                with patience:
                    self.tenants[planned.name] = await self._create(planned, service, password)
            key = await service.issue_api_key(TenantId(self.tenants["over-http"].id), ["jobs:read", "jobs:write"])
        self._api_key = key.key

    async def _create(self, planned: Planned, service: TenantService, password: str) -> Tenant:
        parent = self.tenants.get(planned.parent or "")
        tenant, _ = await service.create_tenant(
            name=planned.name, slug=planned.name, owner_email=f"{planned.name}@chaos.example",
            owner_password_hash=password, tier=planned.tier, quotas=planned.quotas,
            parent_id=TenantId(parent.id) if parent else None,
        )  # fmt: skip
        return Tenant(tenant.id, tenant.root_id, planned.name, planned.requests, planned.usage, planned.flags)

    async def _sample(self) -> None:
        """Note the positions in Postgres each second; while it is down there is nothing to note."""
        while not await elapse(SAMPLE_INTERVAL_S, self._calm):
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
                owner = await self.owner()
                try:
                    self.positions.append(await read_positions(owner))
                finally:
                    await owner.close(timeout=CALL_S_MAX)

    def said_by_fail_points(self) -> str:
        """What fail points have noted, as text."""
        return json.dumps(self.fleet.noted())
