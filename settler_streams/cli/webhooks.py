"""``settler tenants webhooks``: where a tenant's events are sent, and what became of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from settler_streams.cli.output import EXIT_DIFFERS, flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.cli.tenant_calls import ACTOR, print_one, tenant_id_of, with_relay
from settler_streams.core.webhooks import PUBLIC_TYPES
from settler_streams.errors import InvalidRequestError
from settler_streams.services.webhooks import Delivery, Webhook, WebhookService
from settler_streams.services.webhooks.deliveries import LISTED_MAX, STATUSES
from settler_streams.services.webhooks.service import OVERLAP_S

T = TypeVar("T")

TEST_POLL_S = 0.2
"""Between two looks at whether a test was sent."""


@click.group()
def webhooks() -> None:
    """Send a tenant's events to its own endpoints."""


@webhooks.command()
@click.argument("tenant")
@click.argument("url")
@flag(
    "--event",
    "events",
    env="SETTLER_WEBHOOK_EVENTS",
    multiple=True,
    type=click.Choice(sorted(PUBLIC_TYPES)),
    help="A type of event to send; may be given several times. None: all of them.",
)
@state_dir_flag()
@json_flag()
def add(tenant: str, url: str, events: tuple[str, ...], state_dir: Path, as_json: bool) -> None:
    """Make a webhook for what happens from now on. Its secret is shown this once."""
    issued = _changed(state_dir, lambda service: service.create(tenant_id_of(tenant), url, events, actor=ACTOR))
    print_one(asdict(issued), as_json=as_json, once="secret")


@webhooks.command("list")
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def list_(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Show the tenant's webhooks, and how each fares."""
    found = _with_service(state_dir, lambda service: service.list(tenant_id_of(tenant)))
    if as_json:
        print_json([asdict(webhook) for webhook in found])
        return
    print_table(
        ("id", "status", "pending", "failures", "skipped", "url", "events"),
        [(w.id, _standing(w), w.pending, w.failures, w.skipped, w.url, ", ".join(w.event_types) or "all")
         for w in found],
    )  # fmt: skip


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@state_dir_flag()
@json_flag()
def pause(tenant: str, webhook: str, state_dir: Path, as_json: bool) -> None:
    """Send nothing for now; what happens meanwhile is sent after `resume`."""
    _print(_changed(state_dir, lambda s: s.pause(tenant_id_of(tenant), webhook, actor=ACTOR)), as_json)


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@state_dir_flag()
@json_flag()
def resume(tenant: str, webhook: str, state_dir: Path, as_json: bool) -> None:
    """Send again, after a pause or after the endpoint's 410 had disabled the webhook."""
    _print(_changed(state_dir, lambda s: s.resume(tenant_id_of(tenant), webhook, actor=ACTOR)), as_json)


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@flag(
    "--overlap",
    env="SETTLER_WEBHOOK_OVERLAP",
    type=int,
    default=OVERLAP_S,
    help="Seconds for which the old secret signs beside the new one.",
)
@state_dir_flag()
@json_flag()
def rotate(tenant: str, webhook: str, overlap: int, state_dir: Path, as_json: bool) -> None:
    """Make a new secret. It is shown this once."""
    issued = _changed(
        state_dir, lambda s: s.rotate_secret(tenant_id_of(tenant), webhook, overlap_s=overlap, actor=ACTOR)
    )
    print_one(asdict(issued), as_json=as_json, once="secret")


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@state_dir_flag()
@json_flag()
def remove(tenant: str, webhook: str, state_dir: Path, as_json: bool) -> None:
    """Remove a webhook and all its deliveries, sent or not."""
    _changed(state_dir, lambda service: service.delete(tenant_id_of(tenant), webhook, actor=ACTOR))
    if as_json:
        print_json({"removed": webhook})


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@flag(
    "--wait",
    "wait_s",
    env="SETTLER_WEBHOOK_TEST_WAIT",
    type=click.IntRange(0, 300),
    default=15,
    help="Seconds to wait for the outcome.",
)
@state_dir_flag()
@json_flag()
def test(tenant: str, webhook: str, wait_s: int, state_dir: Path, as_json: bool) -> None:
    """Send an event of type settler.webhook.test.v1 now. Exit code 3: it has not arrived."""

    async def work(service: WebhookService) -> Delivery:
        tenant_id, ends_s = tenant_id_of(tenant), time.monotonic() + wait_s
        event_id = await service.deliveries.send_test(tenant_id, webhook, actor=ACTOR)
        while True:
            delivery = await service.deliveries.get(tenant_id, webhook, event_id)
            if delivery.attempts or delivery.finished_at or time.monotonic() >= ends_s:
                return delivery
            await asyncio.sleep(TEST_POLL_S)

    delivery = _with_service(state_dir, work)
    if as_json:
        print_json(asdict(delivery))
    else:
        print_table(("", ""), asdict(delivery).items())
        if not delivery.attempts:
            click.echo("not sent yet; is a courier running?", err=True)
    sys.exit(0 if delivery.status == "delivered" else EXIT_DIFFERS)


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@flag("--status", env="SETTLER_DELIVERY_STATUS", type=click.Choice(STATUSES), default=None, help="Only these.")
@flag("--limit", env="SETTLER_LIMIT", type=click.IntRange(1, LISTED_MAX), default=100, help="At most so many.")
@state_dir_flag()
@json_flag()
def deliveries(tenant: str, webhook: str, status: str | None, limit: int, state_dir: Path, as_json: bool) -> None:
    """Show the newest deliveries: those that ended are kept for a week, dead ones for thirty days."""
    found = _with_service(
        state_dir, lambda s: s.deliveries.recent(tenant_id_of(tenant), webhook, status=status, limit=limit)
    )
    if as_json:
        print_json([asdict(delivery) for delivery in found])
        return
    print_table(
        ("event", "type", "status", "attempts", "outcome", "answer", "last attempt", "next attempt"),
        [
            (d.event_id, d.event_type, d.status, d.attempts, d.last_outcome, d.last_status, _time(d.last_attempt_at),
             _time(d.next_attempt_at) if d.status == "pending" else "")
            for d in found
        ],
    )  # fmt: skip


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@click.argument("event_ids", nargs=-1, metavar="[EVENT]...")
@flag("--all", "everything", env="SETTLER_REDRIVE_ALL", is_flag=True, help="Every dead delivery of the webhook.")
@state_dir_flag()
@json_flag()
def redrive(
    tenant: str, webhook: str, event_ids: tuple[str, ...], everything: bool, state_dir: Path, as_json: bool
) -> None:
    """Send dead deliveries again, under the ids that they had; 10,000 at a time at most, the oldest first."""
    if bool(event_ids) == everything:
        raise InvalidRequestError("name EVENTs, or give --all; `deliveries --status dead` shows what there is")
    driven = _with_service(
        state_dir,
        lambda s: s.deliveries.redrive(tenant_id_of(tenant), webhook, None if everything else event_ids, actor=ACTOR),
    )
    if as_json:
        print_json({"redriven": driven})
    else:
        click.echo(f"{len(driven)} redriven")


def _with_service(state_dir: Path, work: Callable[[WebhookService], Awaitable[T]]) -> T:
    async def run() -> T:
        async with WebhookService.connect(settings_of(state_dir)) as service:
            return await work(service)

    return asyncio.run(run())


def _changed(state_dir: Path, work: Callable[[WebhookService], Awaitable[T]]) -> T:
    return with_relay(state_dir, lambda pool: work(WebhookService(pool, settings_of(state_dir))))


def _time(moment: dt.datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="seconds")


def _standing(webhook: Webhook) -> str:
    return f"{webhook.status}: {webhook.disabled_reason}" if webhook.disabled_reason else webhook.status


def _print(webhook: Webhook, as_json: bool) -> None:
    document: dict[str, Any] = asdict(webhook)
    if as_json:
        print_json(document)
    else:
        print_table(("", ""), document.items())
