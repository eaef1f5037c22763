"""``settler tenants webhooks``: where a tenant's events are sent, and what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from settler_streams.cli.output import flag, json_flag, print_json, print_table, state_dir_flag
from settler_streams.cli.target import settings_of
from settler_streams.core.webhooks import PUBLIC_TYPES
from settler_streams.errors import InvalidRequestError
from settler_streams.ids import TenantId, canonical_tenant
from settler_streams.services.webhooks import IssuedSecret, Webhook, WebhookService
from settler_streams.services.webhooks.service import OVERLAP_S

T = TypeVar("T")

ACTOR = "cli"


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
    _print_secret(
        _with_service(state_dir, lambda service: service.create(_tenant_id(tenant), url, events, actor=ACTOR)), as_json
    )


@webhooks.command("list")
@click.argument("tenant")
@state_dir_flag()
@json_flag()
def list_(tenant: str, state_dir: Path, as_json: bool) -> None:
    """Show the tenant's webhooks, and how each fares."""
    found = _with_service(state_dir, lambda service: service.list(_tenant_id(tenant)))
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
    _print(_with_service(state_dir, lambda s: s.pause(_tenant_id(tenant), webhook, actor=ACTOR)), as_json)


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@state_dir_flag()
@json_flag()
def resume(tenant: str, webhook: str, state_dir: Path, as_json: bool) -> None:
    """Send again, after a pause or after the endpoint's 410 had disabled the webhook."""
    _print(_with_service(state_dir, lambda s: s.resume(_tenant_id(tenant), webhook, actor=ACTOR)), as_json)


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
    _print_secret(
        _with_service(
            state_dir, lambda s: s.rotate_secret(_tenant_id(tenant), webhook, overlap_s=overlap, actor=ACTOR)
        ),
        as_json,
    )


@webhooks.command()
@click.argument("tenant")
@click.argument("webhook")
@state_dir_flag()
@json_flag()
def remove(tenant: str, webhook: str, state_dir: Path, as_json: bool) -> None:
    """Remove a webhook and all its deliveries, sent or not."""
    _with_service(state_dir, lambda service: service.delete(_tenant_id(tenant), webhook, actor=ACTOR))
    if as_json:
        print_json({"removed": webhook})


def _with_service(state_dir: Path, work: Callable[[WebhookService], Awaitable[T]]) -> T:
    async def run() -> T:
        async with WebhookService.connect(settings_of(state_dir)) as service:
            return await work(service)

    return asyncio.run(run())


def _tenant_id(text: str) -> TenantId:
    try:
        return canonical_tenant(text)
    except ValueError as error:
        raise InvalidRequestError(str(error)) from error


def _standing(webhook: Webhook) -> str:
    return f"{webhook.status}: {webhook.disabled_reason}" if webhook.disabled_reason else webhook.status


def _print(webhook: Webhook, as_json: bool) -> None:
    document: dict[str, Any] = asdict(webhook)
    if as_json:
        print_json(document)
    else:
        print_table(("", ""), document.items())


def _print_secret(issued: IssuedSecret, as_json: bool) -> None:
    if as_json:
        print_json(asdict(issued))
    else:
        print_table(("", ""), [("webhook", issued.webhook_id), ("secret", issued.secret)])
