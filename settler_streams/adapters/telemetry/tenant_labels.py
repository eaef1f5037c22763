"""Which tenants have a label of their own in the metrics; everyone else is ``other``.

A label per tenant would give a process as many time series as there are tenants. Exact figures per tenant are in
Postgres; the metrics say who matters now.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from settler_streams.ids import TenantId

OTHER = "other"
LABELLED_MAX = 50
"""Tenants with a label. The per-tenant metrics have at most 40 series per label, so they stay under 2,050."""
RANKING_EVERY = 10_000
"""Observations between two rankings: the cost of sorting is spread over them, and memory between them is bounded."""
REMEMBERED_MAX = 1_000
"""Tenants whose activity survives a ranking: twenty candidates for each label."""
LEAD = 2
"""A tenant without a label takes one from a tenant that is less than half as active: labels do not flicker."""

Forget = Callable[[TenantId], None]


class TenantLabels:
    """Labels by activity (lossy counting with a decay). ``forget`` is told of each tenant that loses its label."""

    def __init__(self, forget: Forget, labelled_max: int = LABELLED_MAX) -> None:
        self._forget = forget
        self._labelled_max = labelled_max
        self._labelled: set[TenantId] = set()
        self._activity: dict[TenantId, int] = {}
        self._until_ranking = RANKING_EVERY

    def label(self, tenant: TenantId) -> str:
        """The label of ``tenant``, for something that it has just done."""
        self._activity[tenant] = self._activity.get(tenant, 0) + 1
        self._until_ranking -= 1
        if self._until_ranking <= 0:
            self._rank()
        if tenant in self._labelled:
            return tenant
        if len(self._labelled) < self._labelled_max:
            self._labelled.add(tenant)
            return tenant
        return OTHER

    def _rank(self) -> None:
        self._until_ranking = RANKING_EVERY
        activity = self._activity

        def standing(tenant: TenantId) -> tuple[int, TenantId]:
            lead = LEAD if tenant in self._labelled else 1
            return (activity.get(tenant, 0) * lead, tenant)

        best = heapq.nlargest(REMEMBERED_MAX, {*activity, *self._labelled}, key=standing)
        kept = set(best[: self._labelled_max])
        for tenant in sorted(self._labelled - kept):
            self._forget(tenant)
        self._labelled = kept
        # Halved, so that yesterday's activity fades; what fades to nothing is forgotten.
        self._activity = {tenant: half for tenant in best if (half := activity.get(tenant, 0) // 2)}


class Foremost:
    """The tenants with the greatest value of something, such as the share of a quota that is used."""

    def __init__(self, forget: Forget, kept_max: int = LABELLED_MAX) -> None:
        self._forget = forget
        self._kept_max = kept_max
        self._values: dict[TenantId, float] = {}

    def admit(self, tenant: TenantId, value: float) -> bool:
        """Whether ``tenant`` is among the foremost with this newest value; the last of them may have to go."""
        if tenant not in self._values and len(self._values) >= self._kept_max:
            last = min(self._values, key=lambda kept: (self._values[kept], kept))
            if self._values[last] >= value:
                return False
            del self._values[last]
            self._forget(last)
        self._values[tenant] = value
        return True
