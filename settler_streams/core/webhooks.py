"""Webhooks, decided without I/O: what tenants may hear of, how a delivery is signed, and when it is tried again.

Signatures follow the Standard Webhooks specification, 1.0: HMAC-SHA256 over id, timestamp and body, one signature per
secret in force.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime

from settler_streams.errors import InvalidRequestError
from settler_streams.events import FlagChanged, JobDecided, JobFinished, Part, QuotaThreshold, TenantNoisy, TenantQuiet

PUBLIC_BODIES: frozenset[type[Part]] = frozenset(
    {JobDecided, JobFinished, QuotaThreshold, TenantNoisy, TenantQuiet, FlagChanged}
)
"""What tenants may hear of. Usage and acknowledgements are the system talking to itself."""
PUBLIC_TYPES = frozenset(body.event_type for body in PUBLIC_BODIES)
TEST_TYPE = "settler.webhook.test.v1"
"""Sent on request, to the webhook that is tested, whatever types it wants."""

SECRET_PREFIX = "whsec_"  # noqa: S105 - the prefix is public
SECRET_BYTES = 32
"""The specification asks for 24 to 64."""

BACKOFF_MIN_S, BACKOFF_MAX_S = 5.0, 4 * 3600.0
"""Doubling from one to the other, over a day: 17 tries, twelve of them in the first six hours."""
JITTER = 0.25
"""A delay is longer or shorter by up to this part of it, so that what failed together does not come back together."""
RETRY_AFTER_MAX_S = 3600.0
"""An endpoint may ask to be left alone for this long; beyond it, we would only learn of its return too late."""
LANE_PAUSE_MIN_S, LANE_PAUSE_MAX_S = 1.0, 60.0
"""Pauses of a whole webhook after failures, doubling: a dead endpoint with a long queue costs one try a minute."""


def event_types(wanted: Iterable[str]) -> list[str]:
    """The types that a webhook is for, sorted; none means all of them.

    Raises:
        InvalidRequestError: one is no public type.
    """
    chosen = sorted(set(wanted))
    if unknown := [name for name in chosen if name not in PUBLIC_TYPES]:
        raise InvalidRequestError(
            f"no such event types: {', '.join(unknown)}; there are {', '.join(sorted(PUBLIC_TYPES))}"
        )
    return chosen


def secret_text(secret: bytes) -> str:
    """A secret as its receiver is told it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def signed_headers(secrets: Iterable[bytes], event_id: str, now_s: int, body: bytes) -> dict[str, str]:
    """The three headers of the specification; the signatures of all ``secrets``, the newest first."""
    signed = f"{event_id}.{now_s}.".encode() + body
    signatures = [
        "v1," + base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode() for secret in secrets
    ]
    return {"webhook-id": event_id, "webhook-timestamp": str(now_s), "webhook-signature": " ".join(signatures)}


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float:
    """How long the endpoint asks to be left alone, in seconds, within bounds; 0 when it does not clearly say."""
    asked = headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():
        seconds = float(asked[:9])
    else:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - now_s
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), RETRY_AFTER_MAX_S)


def backoff_s(attempts: int, jitter: float, asked_s: float = 0.0) -> float:
    """The delay after the ``attempts``-th failure, counted from 1. ``jitter`` is drawn from -1 to 1."""
    delay = min(BACKOFF_MIN_S * 2.0 ** min(attempts - 1, 30), BACKOFF_MAX_S)
    return max(delay * (1 + JITTER * jitter), asked_s)


def lane_pause_s(failures: int, asked_s: float = 0.0) -> float:
    """How long a webhook pauses after its ``failures``-th failure in a row, counted from 1."""
    return max(min(LANE_PAUSE_MIN_S * 2.0 ** min(failures - 1, 30), LANE_PAUSE_MAX_S), asked_s)
