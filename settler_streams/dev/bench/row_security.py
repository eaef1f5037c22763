"""What row-level security costs: the gateway's and the recorder's own statements, on the same rows with it and without.

A database holds the rows of 10,000 tenants. Two logins with the same grants use it, the services' own and one with
BYPASSRLS, for whom PostgreSQL leaves the policies out of its plans; rows, indexes and pages are the same. The
statements run as both in turn, for the same tenant, so that what disturbs one moment disturbs both alike. Timed is
what a caller waits for: of the gateway's reads the connection, the context, the rows and the commit; of the recorder's
batches the context, the position, the rows and the commit. Of the reads the statement is timed alone, too.

Compared is the best of some successive runs, as ``timeit`` does: the 95th percentile of single runs is that of the
machine's pauses, and one and the same login differs from itself by several per cent there. Of all reads together, and
of all batches, there are enough runs to compare the single ones as well.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import random
import secrets
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr

from settler_streams.adapters.postgres import projection, roles
from settler_streams.adapters.postgres.migrations import migrate
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.adapters.postgres.tenant_schemas import owner_connection
from settler_streams.dev.bench.ground import SEED
from settler_streams.dev.bench.recorded import WRITES, Effects
from settler_streams.ids import TenantId
from settler_streams.services import queries
from settler_streams.settings import Settings

if TYPE_CHECKING:
    from settler_streams.adapters.postgres.pool import Transaction
    from settler_streams.adapters.postgres.roles import Connection

WARM_UP_RUNS = 8
"""Of each block; PostgreSQL plans a prepared statement five times before it keeps the plan."""
BEST_OF = 4
"""Successive runs, of which the best counts. Each login is first in two of them; each run has tenants of its own, so
that none finds its rows in the processor's caches because of the run before."""
BATCH_TENANTS = 50
"""Tenants of one batch of the recorder, which has two records of each of them."""
RECORDS = 2
JOBS = 10
"""Finished jobs of each tenant, each with five matches and five unmatched records."""
ERROR_OF_MEDIAN, QUARTILES_APART = 1.2533, 1.3490
"""Of normal values: a median's error by a mean's, and how many standard deviations the quartiles are apart."""
KEY_HASH = b"\x01" * 32


class Sizes(NamedTuple):
    """Tenants in the database, and runs of each statement as each login.

    The runs are timed in blocks, each on new connections, and a figure is the median of the blocks': what one process
    of the server has by chance, and a slow minute of the machine, fall into one.
    """

    tenants: int = 10_000
    runs: int = 600
    blocks: int = 10


class Overhead(NamedTuple):
    """The 95th percentile under row-level security by that without."""

    ratio_p95: float
    error: float
    """Its standard error, by how the blocks scatter."""


class Cost(NamedTuple):
    """Times of a statement under row-level security, and its overhead."""

    p50_ms: float
    p95_ms: float
    overhead: Overhead


class Together(NamedTuple):
    """The overhead of several statements, of the best of successive runs and of every single one."""

    best: Overhead
    single: Overhead


class Costs(NamedTuple):
    """Of what the gateway's reads wait for together, of the recorder's batches together, and of each statement."""

    gateway: Together
    recorder: Together
    statements: Mapping[str, Cost]


def tenant(number: int) -> TenantId:
    """The id of one of the tenants."""
    return TenantId(str(_uuid(f"tenant {number}")))


def job(number: int, which: int) -> uuid.UUID:
    """The id of a job of a tenant's."""
    return _uuid(f"job {number} {which}")


def _uuid(name: str) -> uuid.UUID:
    return uuid.UUID(bytes=hashlib.md5(name.encode(), usedforsecurity=False).digest())


# The gateway's statements, with the arguments that it gives them for a tenant and one of its jobs.
Arguments = Callable[[TenantId, uuid.UUID], tuple[object, ...]]
READS: dict[str, tuple[str, Arguments]] = {
    "tenant": (queries.READ_TENANT, lambda tenant_id, _job: (tenant_id,)),
    "authenticate": (queries.FIND_API_KEY, lambda tenant_id, _job: (tenant_id, KEY_HASH)),
    "job": (queries.READ_JOB, lambda tenant_id, job_id: (tenant_id, job_id)),
    "matches": (queries.READ_MATCHES, lambda tenant_id, job_id: (tenant_id, job_id, 0, 100)),
    "unmatched": (queries.READ_UNMATCHED, lambda tenant_id, job_id: (tenant_id, job_id, 0, 100)),
    "report": (queries.READ_REPORT, lambda tenant_id, job_id: (tenant_id, job_id)),
    "quota": (queries.READ_QUOTA_USAGE, lambda tenant_id, _job: (tenant_id,)),
    "verdicts": (queries.CURRENT_VERDICTS, lambda tenant_id, _job: (tenant_id,)),
}
RECORDER = "recorder"
STATEMENT = "statement"
"""A read without the transaction that it always has around it."""
CONTROL = "control"
"""A job read as the bound login both times: what this measurement tells of no difference at all."""

_SET_TENANTS = "SELECT set_config('bench.tenants', $1, true)"
_FILL = """
CREATE TEMP TABLE bench_tenants ON COMMIT DROP AS
SELECT n, md5('tenant ' || n)::uuid AS tenant FROM generate_series(0, current_setting('bench.tenants')::int - 1) AS n;
CREATE TEMP TABLE bench_jobs ON COMMIT DROP AS
SELECT tenant, md5('job ' || n || ' ' || j)::uuid AS job FROM bench_tenants, generate_series(0, 9) AS j;

INSERT INTO tenants (id, root_id, slug, name, tier) SELECT tenant, tenant, 't-' || n, 'T', 'growth' FROM bench_tenants;
INSERT INTO api_keys (tenant_id, id, key_hash, name, scopes)
SELECT tenant, tenant, decode(repeat('01', 32), 'hex'), 'k', '{jobs:read}' FROM bench_tenants;
INSERT INTO webhooks (tenant_id, id, url, event_types, secret_key_id, secret_encrypted)
SELECT tenant, tenant, 'https://hooks.example', '{}', 'k', decode(repeat('01', 60), 'hex') FROM bench_tenants;
INSERT INTO webhook_lanes (tenant_id, webhook_id) SELECT tenant, tenant FROM bench_tenants;
INSERT INTO webhook_deliveries (tenant_id, webhook_id, event_id, event_type, body)
SELECT tenant, tenant, md5('event ' || n || ' ' || e)::uuid, 't', '{}' FROM bench_tenants, generate_series(1, 5) AS e;
INSERT INTO tenant_quota_usage
SELECT tenant, quota, 1, 0, 100, NULL, 1
FROM bench_tenants, unnest(ARRAY['storage', 'monthly_reconciliations', 'concurrent_jobs']) AS quota;
INSERT INTO tenant_signals (tenant_id, signal_id, kind, resource, signalled_at, source_version)
SELECT tenant, md5('signal ' || n || ' ' || s)::uuid, 'noisy', 'requests', now(), s
FROM bench_tenants, generate_series(1, 3) AS s;
INSERT INTO jobs (tenant_id, job_id, kind, priority, decision, requested_at, decided_at, decision_version, outcome,
                  accepted_attempt, finished_at, result_version)
SELECT tenant, job, 'reconciliation', 'normal', 'admitted', now(), now(), 1, 'succeeded', 1, now(), 2 FROM bench_jobs;
INSERT INTO executions (tenant_id, job_id, attempt, executor, status, source_version)
SELECT tenant, job, 1, 'e', 'succeeded', 1 FROM bench_jobs;
INSERT INTO reports SELECT tenant, job, 1, 'EUR', 5, 10, 5, 5, 0, 0, 0, 5, 5, 0, 0, 0, 0 FROM bench_jobs;
INSERT INTO matches
SELECT tenant, job, 1, r, 'exact', 'l', ARRAY['r'], 'EUR', 'EUR', 1, 1, 0 FROM bench_jobs, generate_series(1, 5) AS r;
INSERT INTO unmatched (tenant_id, job_id, attempt, row_no, side, record_no, reason)
SELECT tenant, job, 1, r, 'left', r, 'missing' FROM bench_jobs, generate_series(1, 5) AS r;
"""

Run = Callable[[TenantConnectionPool, int, int, int], Awaitable[tuple[float, ...]]]
"""Runs a statement as one of the two logins (0, 1), for a tenant, with the number of the run; returns the seconds that
a caller waits, and of a read those of the statement alone."""
Block = tuple[Sequence[float], Sequence[float]]
"""Seconds under row-level security, and without."""
Opener = Callable[[], Awaitable[TenantConnectionPool]]
"""Connects as one of the two logins."""


async def measure(settings: Settings, sizes: Sizes) -> Costs:
    """What row-level security costs each statement.

    Args:
        settings: of a server, whose owner is a superuser; a database is made on it, and stays with it.
        sizes: how much is measured.
    """
    drawn = random.Random(SEED)  # noqa: S311 - repeatable, not secret
    async with filled(settings, "secured", sizes.tenants), _unbound(database(settings, "secured")) as unbound:
        bound = partial(TenantConnectionPool.open, database(settings, "secured"))
        both, twice = (bound, unbound), (bound, bound)
        statements = {name: _Statement(both, _read(*read)) for name, read in READS.items()}
        statements |= {
            f"{RECORDER}: {topic}": _Statement(both, _record(sizes.tenants, topic, of)) for topic, of in WRITES.items()
        }
        statements[CONTROL] = _Statement(twice, _read(*READS["job"]))
        await _checkpoint(database(settings, "secured"))
        gc.disable()  # as timeit does: it would stop the clock of whichever statement is under way
        try:
            for _ in range(sizes.blocks):  # of one statement after another: a slow minute falls into a block of each
                for statement in statements.values():
                    await statement.run_block(sizes, drawn)
        finally:
            gc.enable()
    costs = {name: statement.costs() for name, statement in statements.items()}
    alone = {f"{STATEMENT}: {name}": costs[name][1] for name in READS}
    return Costs(
        _together(statements[name].blocks() for name in READS),
        _together(statement.blocks() for name, statement in statements.items() if name.startswith(RECORDER)),
        {name: waited for name, (waited, *_) in costs.items()} | alone,
    )


def _together(statements: Iterable[Sequence[Block]]) -> Together:
    single = [block for blocks in statements for block in blocks]
    return Together(_overhead([_best_of_both(block) for block in single]), _overhead(single))


async def _checkpoint(settings: Settings) -> None:
    """Write out what was filled in now: the server would do it while the first statements are timed."""
    async with owner_connection(settings) as owner:
        await owner.execute("CHECKPOINT")


@asynccontextmanager
async def _unbound(settings: Settings) -> AsyncIterator[Opener]:
    """A login beside the services' own that no policy binds, for as long as this takes.

    Its pool is the services' own too. That refuses a login with BYPASSRLS, which is given once it is connected. Nobody
    else knows its password, should the run be killed before it is dropped.
    """
    secret = {"db_app_user": f"{settings.db_app_user}_unbound", "db_app_password": SecretStr(secrets.token_urlsafe())}
    login = settings.model_copy(update=secret)

    async def connect() -> TenantConnectionPool:
        await roles.execute_formatted(owner, "ALTER ROLE %I NOBYPASSRLS", login.db_app_user)
        pool = await TenantConnectionPool.open(login)
        await roles.execute_formatted(owner, "ALTER ROLE %I BYPASSRLS", login.db_app_user)
        return pool

    async with owner_connection(settings) as owner:
        await roles.create_roles(owner, login)
        try:
            yield connect
        finally:
            await roles.execute_formatted(owner, "DROP ROLE %I", login.db_app_user)


def database(settings: Settings, name: str) -> Settings:
    """The settings of a database beside the deployment's."""
    return settings.model_copy(update={"db_name": f"{settings.db_name}_{name}"})


@asynccontextmanager
async def filled(settings: Settings, name: str, tenants: int) -> AsyncIterator[TenantConnectionPool]:
    """A new database with the rows of so many tenants, vacuumed and analysed; row-level security is on."""
    settings = database(settings, name)
    await migrate(settings)
    async with owner_connection(settings) as owner:
        await _switch(owner, "DISABLE")  # or an owner that is no superuser could not write for all of them
        async with owner.transaction():
            await owner.execute(_SET_TENANTS, str(tenants))
            await owner.execute(_FILL)
        await _switch(owner, "ENABLE")
        await owner.execute("VACUUM ANALYZE")
    pool = await TenantConnectionPool.open(settings)
    try:
        yield pool
    finally:
        await pool.close()


async def _switch(owner: Connection, how: str) -> None:
    for row in await owner.fetch(
        "SELECT DISTINCT polrelid::regclass::text FROM pg_policy JOIN pg_class c ON c.oid = polrelid"
        " WHERE c.relnamespace = 'public'::regnamespace"
    ):
        await owner.execute(f"ALTER TABLE {row[0]} {how} ROW LEVEL SECURITY")


def _read(query: str, arguments: Arguments) -> Run:
    """A read of the gateway's, in its transaction."""

    async def run(pool: TenantConnectionPool, _login: int, number: int, which: int) -> tuple[float, ...]:
        tenant_id, given = tenant(number), arguments(tenant(number), job(number, which % JOBS))
        began_s = time.perf_counter()
        async with pool.tenant(tenant_id, read_only=True) as tx:
            statement_began_s = time.perf_counter()
            found = await tx.fetch(query, *given)
            statement_ended_s = time.perf_counter()
        ended_s = time.perf_counter()
        if not found:
            raise LookupError(f"no row for tenant {number}")
        return ended_s - began_s, statement_ended_s - statement_began_s

    return run


def _record(tenants: int, topic: str, effects: Effects) -> Run:
    """A batch of the recorder: records of some tenants, ``effects`` of each, and the position behind them."""
    topic_id = str(_uuid(topic))

    async def run(pool: TenantConnectionPool, login: int, _number: int, which: int) -> tuple[float, ...]:
        chosen = random.Random(which).sample(range(tenants), BATCH_TENANTS)  # noqa: S311 - repeatable, not secret
        first, consumer = which * BATCH_TENANTS * RECORDS, f"{RECORDER} {login}"
        records = [
            effects(tenant(number), str(_uuid(f"job {login} {first + at}")), first + at)
            for at, number in enumerate(chosen * RECORDS)
        ]
        move = projection.PositionMove(consumer, topic_id, topic, 0, first, first + len(records))
        if not which:
            await projection.init_position(pool, consumer, topic_id, topic, 0)
        began_s = time.perf_counter()
        await projection.write_batch(pool, move, records)
        return (time.perf_counter() - began_s,)

    return run


class _Statement:
    """A statement as two logins in turn, each first as often as the other; the policies bind the first one."""

    def __init__(self, logins: tuple[Opener, Opener], run: Run) -> None:
        self._logins, self._run = logins, run
        self._counted = itertools.count()
        self._blocks: list[list[list[tuple[float, ...]]]] = []

    async def run_block(self, sizes: Sizes, drawn: random.Random) -> None:
        """Run it some times, on new connections."""
        times: list[list[tuple[float, ...]]] = [[], []]
        async with AsyncExitStack() as opened:
            pools = [await connect() for connect in self._logins]
            for pool in pools:
                opened.push_async_callback(pool.close)
            for _ in range(WARM_UP_RUNS + max(2 * BEST_OF, sizes.runs // sizes.blocks)):
                number, which = drawn.randrange(sizes.tenants), next(self._counted)
                for login in ((0, 1), (1, 0))[which % 2]:
                    times[login].append(await self._run(pools[login], login, number, which))
        self._blocks.append([[*zip(*each[WARM_UP_RUNS:], strict=True)] for each in times])

    def blocks(self, what: int = 0) -> list[Block]:
        """All runs of each block, by one of the times that its runs return."""
        return [(mine[what], without[what]) for mine, without in self._blocks]

    def costs(self) -> list[Cost]:
        """What each of the times that its runs return has to say, by the best runs."""
        times = range(len(self._blocks[0][0]))
        return [_cost([_best_of_both(block) for block in self.blocks(what)]) for what in times]


def _cost(blocks: Sequence[Block]) -> Cost:
    return Cost(
        statistics.median(statistics.median(mine) for mine, _ in blocks) * 1e3,
        statistics.median(_p95(mine) for mine, _ in blocks) * 1e3,
        _overhead(blocks),
    )


def _overhead(blocks: Sequence[Block]) -> Overhead:
    """The median of the blocks, and its error by their quartiles: one in a slow minute counts no more than another."""
    ratios = [_p95(mine) / _p95(without) for mine, without in blocks]
    lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    error = ERROR_OF_MEDIAN * (upper - lower) / QUARTILES_APART / math.sqrt(len(ratios))
    return Overhead(statistics.median(ratios), error)


def _p95(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1]


def _best(seconds: Sequence[float]) -> list[float]:
    """The best of each successive ``BEST_OF``."""
    return [min(seconds[first : first + BEST_OF]) for first in range(0, len(seconds) - BEST_OF + 1, BEST_OF)]


def _best_of_both(block: Block) -> Block:
    mine, without = block
    return _best(mine), _best(without)


async def plan(tx: Transaction, query: str, arguments: tuple[object, ...]) -> list[dict[str, Any]]:
    """The nodes of a statement's plan, as PostgreSQL shows them."""
    (found,) = json.loads(await tx.fetchval("EXPLAIN (FORMAT JSON) " + query, *arguments))
    nodes, open_nodes = [], [found["Plan"]]
    while open_nodes:
        nodes.append(open_nodes.pop())
        open_nodes += nodes[-1].get("Plans", ())
    return nodes
