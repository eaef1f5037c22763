"""What a tenant's own limits may be, and how a change of some leaves the others."""

from __future__ import annotations

from collections.abc import Mapping

from settler_streams.errors import InvalidRequestError
from settler_streams.events import QuotaType
from settler_streams.tiers import LIMIT_MAX


def adjusted(own: Mapping[QuotaType, int], limits: Mapping[QuotaType, int | None]) -> dict[QuotaType, int]:
    """``own`` with ``limits`` over it, in the units of :class:`~settler_streams.tiers.Tier`; None takes one away.

    Raises:
        InvalidRequestError: a limit is negative, or beyond :data:`~settler_streams.tiers.LIMIT_MAX`.
    """
    for quota, limit in limits.items():
        if limit is not None and not 0 <= limit <= LIMIT_MAX:
            raise InvalidRequestError(f"a limit is 0 to {LIMIT_MAX}, which {quota.value}={limit} is not")
    return {quota: limit for quota, limit in {**own, **limits}.items() if limit is not None}
