"""``settler dlq``: list, look at and redrive dead letters."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from settler_streams.adapters.kafka import dead_letters
from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.kafka.dead_letters import LIST_MAX, DeadLetter, Redriven, Selection
from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.errors import ConflictError, InvalidRequestError
from settler_streams.ids import TenantId
from settler_streams.services import TenantDirectory
from settler_streams.settings import Settings
from settler_streams.topology import load_topology

RATE_MAX = 100_000

reason_flag = flag("--reason", env="SETTLER_DLQ_REASON", help="Only this class of failure, such as schema.")
tenant_flag = flag("--tenant", env="SETTLER_DLQ_TENANT", help="Only this root tenant.")
topic_flag = flag("--topic", env="SETTLER_DLQ_TOPIC", help="Only records from this topic, such as job-requests.")
since_flag = flag(
    "--since",
    env="SETTLER_DLQ_SINCE",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]),
    help="Only what was refused at or after this time (UTC).",
)
limit_flag = flag(
    "--limit", env="SETTLER_DLQ_LIMIT", type=click.IntRange(1, LIST_MAX), default=100, help="At most this many."
)


@click.group()
def dlq() -> None:
    """Dead letters: records that could not be processed, kept for 30 days with their bytes."""


@dlq.command(name="list")
@reason_flag
@tenant_flag
@topic_flag
@since_flag
@limit_flag
@flag("--open", "open_only", env="SETTLER_DLQ_OPEN", is_flag=True, help="Leave out redriven and quarantined ones.")
@state_dir_flag()
@json_flag()
def list_(
    reason: str | None,
    tenant: str | None,
    topic: str | None,
    since: dt.datetime | None,
    limit: int,
    open_only: bool,
    state_dir: Path,
    as_json: bool,
) -> None:
    """List dead letters, oldest first."""
    selection = Selection(reason, tenant, topic, _ms(since), open_only=open_only)
    found = asyncio.run(_select(settings_of(state_dir), selection, limit))
    if as_json:
        print_json([dead_letters.as_json(letter) for letter in found])
        return
    rows = [(one.id, _time(one), one.tenant, one.reason, _origin(one), one.attempts, _note(one)) for one in found]
    print_table(("id", "refused at", "tenant", "reason", "origin", "attempts", ""), rows)


@dlq.command()
@click.argument("letter_id", metavar="ID")
@flag("--raw", env="SETTLER_DLQ_RAW", is_flag=True, help="Only the record's bytes, as they came.")
@state_dir_flag()
@json_flag()
def show(letter_id: str, raw: bool, state_dir: Path, as_json: bool) -> None:
    """Show one dead letter with its headers and bytes."""
    letter = asyncio.run(_find(settings_of(state_dir), letter_id))
    if raw:
        click.get_binary_stream("stdout").write(letter.value)
        return
    headers = {name: value.decode(errors="replace") for name, value in letter.headers.items()}
    if as_json:
        value = base64.b64encode(letter.value).decode()
        print_json({**dead_letters.as_json(letter), "headers": headers, "value_base64": value})
        return
    print_table(("header", "value"), headers.items())
    click.echo()
    click.echo(letter.value.decode(errors="backslashreplace"))


@dlq.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1)
@reason_flag
@tenant_flag
@topic_flag
@since_flag
@limit_flag
@flag("--all", "everything", env="SETTLER_DLQ_ALL", is_flag=True, help="Every open one, up to the limit.")
@flag("--rate", env="SETTLER_DLQ_RATE", type=click.IntRange(1, RATE_MAX), default=50, help="Records per second.")
@flag("--force", env="SETTLER_DLQ_FORCE", is_flag=True, help="Quarantined and already redriven ones, too.")
@state_dir_flag()
@json_flag()
def redrive(
    letter_ids: tuple[str, ...],
    reason: str | None,
    tenant: str | None,
    topic: str | None,
    since: dt.datetime | None,
    limit: int,
    everything: bool,
    rate: int,
    force: bool,
    state_dir: Path,
    as_json: bool,
) -> None:
    """Send dead letters back to the topic and partition they came from.

    Name them by ID, by filters, or all with --all. Only one redrive works at a time; a later one takes over.
    """
    if not (letter_ids or everything or reason or tenant or topic or since):
        raise InvalidRequestError("say which: IDs, a filter, or --all; `settler dlq list` shows what there is")
    selection = Selection(reason, tenant, topic, _ms(since), frozenset(letter_ids))
    limit = max(limit, len(letter_ids))
    outcome = _redrive(settings_of(state_dir), selection, limit, rate, force=force)
    if as_json:
        print_json({"sent": outcome.sent, "quarantined": outcome.quarantined, "already_redriven": outcome.already})
    else:
        click.echo(f"{len(outcome.sent)} redriven")
    _refuse_what_was_named(letter_ids, outcome)


def _redrive(settings: Settings, selection: Selection, limit: int, rate: int, *, force: bool) -> Redriven:
    with Progress(console=Console(stderr=True), transient=True, disable=not Console(stderr=True).is_terminal) as bar:
        task = bar.add_task("redriving", total=None)

        async def work() -> Redriven:
            return await dead_letters.redrive(
                settings,
                load_topology(),
                replace(selection, erased=await _erased(settings)),
                limit=limit,
                rate_per_s=rate,
                force=force,
                on_sent=lambda sent: bar.advance(task, sent),
            )

        return asyncio.run(work())


async def _select(settings: Settings, selection: Selection, limit: int) -> list[DeadLetter]:
    chosen = replace(selection, erased=await _erased(settings))
    return await dead_letters.select(settings, load_topology(), chosen, limit)


async def _find(settings: Settings, letter_id: str) -> DeadLetter:
    return await dead_letters.find(settings, load_topology(), letter_id, await _erased(settings))


async def _erased(settings: Settings) -> frozenset[TenantId]:
    """The tenants of whom nothing is shown any more, although their records may lie in Kafka for days."""
    async with Cluster.of(settings).admin():
        directory = TenantDirectory(settings)  # which would be patient with a broker that is not there
    await directory.start()
    try:
        return directory.erased
    finally:
        await directory.stop()


def _refuse_what_was_named(letter_ids: tuple[str, ...], outcome: Redriven) -> None:
    left = [
        *(f"{name} was redriven before" for name in outcome.already),
        *(f"{name} is quarantined" for name in outcome.quarantined),
        *(f"{name} is not there" for name in sorted(set(letter_ids) - _known(outcome))),
    ]
    if left:
        raise ConflictError(f"{'; '.join(left)}; look at it with `settler dlq show`, --force sends it all the same")


def _known(outcome: Redriven) -> set[str]:
    return {*outcome.sent, *outcome.already, *outcome.quarantined}


def _ms(moment: dt.datetime | None) -> int | None:
    return None if moment is None else int(moment.replace(tzinfo=dt.UTC).timestamp() * 1000)


def _time(letter: DeadLetter) -> str:
    return dt.datetime.fromtimestamp(letter.at_ms / 1000, dt.UTC).isoformat(timespec="seconds")


def _origin(letter: DeadLetter) -> str:
    return f"{letter.topic}-{letter.origin_partition}@{letter.origin_offset}"


def _note(letter: DeadLetter) -> str:
    return "redriven" if letter.redriven else "quarantined" if letter.quarantined else ""
