"""The faults: each does its harm for a time that the seed gives, undoes it, and says how often it struck."""

from __future__ import annotations

import asyncio
import functools
import random
import signal
from collections.abc import Awaitable, Callable

import asyncpg
import redis.asyncio

from settler_streams.dev.stack import PartName
from tests.chaos.field_of_work import EXECUTORS, SESSION_S, WORKERS, Field
from tests.chaos.pace import elapse, observe
from tests.chaos.proxy import (
    CALM,
    Trap,
    Weather,
    kafka_commit,
    kafka_commit_reply,
    postgres_commit,
    postgres_commit_reply,
)

ZOMBIE_S = 1.8 * SESSION_S
"""Past the session timeout and the takeover; well below the ten seconds after which its transaction would be aborted,
so that what the zombie tries in the end is refused for its epoch and not for its age."""
STRIKE_S_MAX = 40.0
"""Longest wait for a process to strike, or for a commit to cut: workers commit several times a second once they run."""
INSIDE_S_MAX = 30.0
STORM_ROUNDS = 3

Fault = Callable[[Field, random.Random], Awaitable[None]]
"""Its own draws, so that another fault at the same time does not change them."""


def _at(service: PartName) -> Callable[[Fault], Fault]:
    """Two blows at one service are struck one after the other, though their turn comes together."""

    def alone(fault: Fault) -> Fault:
        @functools.wraps(fault)
        async def turn(field: Field, chance: random.Random) -> None:
            async with field.struck[service]:
                await fault(field, chance)

        return turn

    return alone


async def _strike_one(
    field: Field, chance: random.Random, names: tuple[str, ...], signum: signal.Signals, what: str
) -> None:
    """Signal one of these processes, once there is one that has run for a moment."""
    await elapse(chance.uniform(0.0, 2.0))
    order = chance.sample(names, len(names))

    async def struck() -> bool:
        return any(field.fleet.steady(name) and field.fleet.signal(name, signum) for name in order)

    await observe(f"{what}: a process to strike", struck, STRIKE_S_MAX)
    field.injected[what] += 1


async def kill_worker(field: Field, chance: random.Random) -> None:
    """SIGKILL, at whatever moment it is."""
    await _strike_one(field, chance, WORKERS, signal.SIGKILL, "worker SIGKILL")


async def kill_executor(field: Field, chance: random.Random) -> None:
    """SIGKILL of an executor; its own child processes have to notice."""
    await _strike_one(field, chance, EXECUTORS, signal.SIGKILL, "executor SIGKILL")


async def zombie(field: Field, chance: random.Random) -> None:
    """SIGSTOP beyond the session timeout; whoever thaws the frozen sends SIGCONT."""
    await _strike_one(field, chance, WORKERS, signal.SIGSTOP, "worker SIGSTOP, later SIGCONT")
    await elapse(ZOMBIE_S + 1.0)


async def storm(field: Field, chance: random.Random) -> None:
    """Workers leave and join in quick succession, each in order, none waited for."""
    for _ in range(STORM_ROUNDS):
        for name in chance.sample(WORKERS, 2):
            field.injected["rebalance storm: worker SIGTERM"] += field.fleet.signal(name, signal.SIGTERM)
            await elapse(chance.uniform(0.3, 1.5))
        await elapse(chance.uniform(1.0, 2.5))


async def next_version(field: Field, chance: random.Random) -> None:
    """A rolling upgrade: from one worker to the next, a program that writes the next format of every state value."""
    for name in WORKERS:
        field.fleet.members[name].format_added = 1
        field.fleet.signal(name, signal.SIGTERM)  # one that is down just now comes back as the next version, too
        field.injected["upgrade to the next state format"] += 1
        await elapse(chance.uniform(1.0, 3.0))


@_at("kafka")
async def broker_killed(field: Field, chance: random.Random) -> None:
    """SIGKILL, then a start."""
    await asyncio.to_thread(field.stack.part("kafka").kill)
    field.injected["broker SIGKILL"] += 1
    await elapse(chance.uniform(0.0, 1.0))
    await field.bring_up("kafka")


@_at("kafka")
async def broker_restarted(field: Field, _chance: random.Random) -> None:
    """SIGTERM, then a start."""
    await asyncio.to_thread(field.stack.part("kafka").stop)
    field.injected["broker SIGTERM"] += 1
    await field.bring_up("kafka")


def broker_frozen(seconds: float) -> Fault:
    """SIGSTOP for so long."""

    @_at("kafka")
    async def fault(field: Field, _chance: random.Random) -> None:
        process = field.stack.part("kafka").process
        process.send(signal.SIGSTOP)
        field.injected[f"broker SIGSTOP for {seconds:.0f} s"] += 1
        try:
            await elapse(seconds)
        finally:
            process.send(signal.SIGCONT)

    return fault


async def backend_terminated(field: Field, _chance: random.Random) -> None:
    """The connection of a client that is inside a transaction, ended by the database's administrator."""
    what = "Postgres backend terminated in a transaction"
    loop = asyncio.get_running_loop()
    until_s = loop.time() + STRIKE_S_MAX
    while loop.time() < until_s:
        try:
            owner = await field.owner()
        except UNREACHABLE:
            await elapse(0.2)
            continue
        try:
            while loop.time() < until_s:
                ended = await owner.fetchval(_END_ONE, field.settings.db_app_user, field.settings.db_name)
                field.injected[what] += ended
                if ended:
                    return
        except UNREACHABLE:
            continue
        finally:
            owner.terminate()


_END_ONE = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity
    WHERE usename = $1 AND datname = $2 AND xact_start IS NOT NULL AND state <> 'idle' LIMIT 1) AS busy
"""
UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)
"""What a fault's own call to Postgres may meet while another fault strikes it."""


@_at("postgres")
async def postgres_restarted(field: Field, _chance: random.Random) -> None:
    """Immediate shutdown (SIGQUIT: no checkpoint, so recovery follows), then a start."""
    part = field.stack.part("postgres")
    part.process.send(signal.SIGQUIT)
    field.injected["Postgres immediate restart"] += 1

    async def ended() -> bool:
        return not part.running

    await observe("Postgres down", ended, INSIDE_S_MAX)
    await field.bring_up("postgres")


def cut(what: str, new_trap: Callable[[], Trap], *, postgres: bool) -> Fault:
    """One connection of a worker is reset when a trap sees its moment."""

    async def fault(field: Field, _chance: random.Random) -> None:
        proxies = field.postgres if postgres else field.kafka
        chosen = [proxies[name] for name in WORKERS]
        done = [proxy.cut_when(new_trap()) for proxy in chosen]
        await asyncio.wait(done, timeout=STRIKE_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        for proxy in chosen:
            proxy.disarm()
        field.injected[what] += sum(future.done() for future in done)

    return fault


@_at("valkey")
async def valkey_killed(field: Field, chance: random.Random) -> None:
    """SIGKILL, a while without it, then a start; what it held is gone."""
    await asyncio.to_thread(field.stack.part("valkey").kill)
    field.injected["Valkey SIGKILL"] += 1
    await elapse(chance.uniform(1.0, 3.0))
    await field.bring_up("valkey")


@_at("valkey")
async def valkey_frozen(field: Field, chance: random.Random) -> None:
    """SIGSTOP for a few seconds."""
    process = field.stack.part("valkey").process
    process.send(signal.SIGSTOP)
    field.injected["Valkey SIGSTOP"] += 1
    await elapse(chance.uniform(2.0, 4.0))
    process.send(signal.SIGCONT)


@_at("valkey")
async def valkey_flushed(field: Field, _chance: random.Random) -> None:
    """Everything in it is gone at once."""
    client = redis.asyncio.Redis.from_url(field.settings.redis_url())
    await client.flushall()
    await client.aclose()
    field.injected["Valkey FLUSHALL"] += 1


def weather(what: str, change: Weather, seconds: float, *, who: tuple[str, ...] = (*WORKERS, *EXECUTORS)) -> Fault:
    """The network of one process, to Kafka and to Postgres, for so long."""

    async def fault(field: Field, chance: random.Random) -> None:
        name = chance.choice(who)
        proxies = (field.kafka[name], field.postgres[name])
        for proxy in proxies:
            proxy.set(change)
            if change.refuses:
                proxy.reset()
        field.injected[f"network {what}"] += 1
        await elapse(seconds)
        for proxy in proxies:
            proxy.set(CALM)

    return fault


async def connections_reset(field: Field, chance: random.Random) -> None:
    """Every connection of one process, at once, when it has some: one that is just starting has none."""
    what = "network reset: connections"
    order = chance.sample((*WORKERS, *EXECUTORS), len(WORKERS) + len(EXECUTORS))

    async def broken() -> bool:
        for name in order:
            if count := field.kafka[name].reset() + field.postgres[name].reset():
                field.injected[what] += count
                return True
        return False

    await observe(f"{what} to break", broken, STRIKE_S_MAX)


def short_list() -> list[Fault]:
    """What the short round does, in an order that the seed gives."""
    return [
        *[kill_worker] * 2, kill_executor, zombie, storm, next_version,
        broker_killed, broker_restarted, broker_frozen(6.0),
        *[backend_terminated] * 2, postgres_restarted, *_cuts(),
        valkey_killed, valkey_frozen, valkey_flushed,
        *_weathers(4.0), connections_reset,
    ]  # fmt: skip


def long_list() -> list[Fault]:
    """A mix of everything; drawn from again and again until the time is over."""
    return [
        *[kill_worker] * 4, *[kill_executor] * 3, *[zombie] * 3, *[storm] * 2, *[next_version],
        *[broker_killed] * 2, *[broker_restarted] * 2, broker_frozen(6.0), broker_frozen(30.0),
        *[backend_terminated] * 3, *[postgres_restarted] * 2, *_cuts() * 2,
        valkey_killed, valkey_frozen, valkey_flushed,
        *_weathers(6.0) * 2, *[connections_reset] * 3,
    ]  # fmt: skip


def _cuts() -> list[Fault]:
    return [
        cut("Postgres commit lost on its way", lambda: postgres_commit, postgres=True),
        cut("Postgres commit reply cut", lambda: postgres_commit_reply, postgres=True),
        cut("Kafka commit lost on its way", lambda: kafka_commit, postgres=False),
        cut("Kafka commit reply cut", kafka_commit_reply, postgres=False),
    ]


def _weathers(seconds: float) -> list[Fault]:
    return [
        weather("refused", Weather(refuses=True), seconds),
        weather("silent", Weather(silent=True), seconds + SESSION_S),
        weather("delayed by 0.15 s", Weather(delay_s=0.15), seconds),
        weather("throttled to 64 kB/s", Weather(bytes_per_s=64_000), seconds),
    ]
