"""The noisy-neighbour rule: a tenant far above the average of the others, window after window.

The specification's rule compares with three times the average. Here it is the average of
the **others**: with the tenant itself in the average, three times it could never be exceeded among three tenants, nor
by a third of all tenants at once.

Usage is summed in event-time windows (:class:`Windows`); ``step`` judges one closed window after another. How the sums
come about is told in :mod:`.noise`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from settler_streams.errors import InvalidRequestError
from settler_streams.ids import TenantId

if TYPE_CHECKING:
    from collections.abc import Mapping

RESOURCES = ("requests", "worker_us", "storage_bytes")
"""What is watched. Each is a sum per window: a count, microseconds of executor time, bytes written."""

Usage = dict[str, dict[TenantId, int]]
"""Resource, tenant, sum of one window."""


class Windows(msgspec.Struct, frozen=True, array_like=True):
    """The grid of windows: six of ten seconds by default, the last two of which may still be corrected.

    A window is named by its number, ``event_ms // width_ms``.
    """

    width_ms: int = 10_000
    kept: int = 6
    lateness_ms: int = 10_000

    def __post_init__(self) -> None:
        if self.width_ms < 1 or self.lateness_ms < 0 or self.lateness_ms >= (self.kept - 1) * self.width_ms:
            raise InvalidRequestError(f"the lateness must fit into the windows that are kept: {self}")

    def open_from(self, now_ms: int) -> int:
        """The oldest window that may still change."""
        return (now_ms - self.lateness_ms) // self.width_ms


class NoisePolicy(msgspec.Struct, frozen=True, array_like=True):
    """When a tenant counts as noisy.

    ``factor`` 3 is the specification's. Others need to exist (``tenants_min``), and an amount below its resource's
    floor (``floors``, in the order of ``RESOURCES``) never alarms: three requests against none are no noise. The floors
    are ten requests a second, one executor kept busy, and 1 MiB/s, each over a window of ten seconds. A tenant is
    flagged once ``enter`` of the last ``of`` windows exceed, so one burst is none, and released after ``quiet`` windows
    in a row that do not.
    """

    factor: int = 3
    tenants_min: int = 2
    enter: int = 3
    of: int = 5
    quiet: int = 5
    floors: tuple[int, int, int] = (100, 10_000_000, 10_485_760)

    def __post_init__(self) -> None:
        if self.factor < 1 or self.tenants_min < 2 or not 1 <= self.enter <= self.of or self.quiet < 1:
            raise InvalidRequestError(f"not a policy: {self}")


class Watch(msgspec.Struct, frozen=True, array_like=True):
    """What is remembered of one tenant and resource; ``exceeded`` covers the last windows, the newest first."""

    exceeded: tuple[bool, ...] = ()
    quiet_windows: int = 0
    noisy: bool = False


class NoiseVerdict(NamedTuple):
    """A tenant became noisy (or quiet again) on one resource: its usage in the window against the others' average.

    ``others_average`` is rounded down; ``ratio_per_mille`` is None when the others used nothing.
    """

    tenant: TenantId
    resource: str
    noisy: bool
    usage: int
    others_average: int
    ratio_per_mille: int | None


WatchKey = tuple[str, TenantId]


def exceeds(usage: int, total: int, tenants: int, floor: int, policy: NoisePolicy) -> bool:
    """Whether ``usage``, a part of ``total``, is above ``factor`` times the average of the other tenants. Exact."""
    if tenants < policy.tenants_min or usage < floor:
        return False
    return usage * (tenants - 1) > policy.factor * (total - usage)


def step(
    watches: Mapping[WatchKey, Watch], usage: Usage, tenants: int, policy: NoisePolicy
) -> tuple[dict[WatchKey, Watch], list[NoiseVerdict]]:
    """Judge one closed window.

    ``tenants`` is the number of active tenants, idle ones in this window included; never taken as fewer than those with
    usage. Returns the watches to keep (tenants without any sign are dropped) and the changes, in a fixed order.
    """
    after: dict[WatchKey, Watch] = {}
    verdicts: list[NoiseVerdict] = []
    for resource, floor in zip(RESOURCES, policy.floors, strict=True):
        sums = usage.get(resource, {})
        total, count = sum(sums.values()), max(tenants, len(sums))
        watched = {tenant for name, tenant in watches if name == resource}
        for tenant in sorted(watched | sums.keys()):
            amount = sums.get(tenant, 0)
            exceeded = exceeds(amount, total, count, floor, policy)
            before = watches.get((resource, tenant), Watch())
            watch = _advance(before, exceeded, policy)
            if watch.noisy or any(watch.exceeded):
                after[resource, tenant] = watch
            if watch.noisy != before.noisy:
                others = total - amount
                average = others // (count - 1) if count > 1 else 0
                ratio = amount * (count - 1) * 1_000 // others if others else None
                verdicts.append(NoiseVerdict(tenant, resource, watch.noisy, amount, average, ratio))
    return after, verdicts


def _advance(watch: Watch, exceeded: bool, policy: NoisePolicy) -> Watch:
    recent = (exceeded, *watch.exceeded)[: policy.of]
    quiet_windows = 0 if exceeded else watch.quiet_windows + 1
    if watch.noisy:
        return Watch(recent, quiet_windows, quiet_windows < policy.quiet)
    return Watch(recent, quiet_windows, exceeded and sum(recent) >= policy.enter)


def max_min_entitlement(
    demands: Mapping[TenantId, int], weights: Mapping[TenantId, int], capacity: int
) -> dict[TenantId, int]:
    """Weighted max-min shares by water-filling, in whole units.

    Nobody gets more than its demand; what a satisfied tenant leaves goes to the others in proportion to their weights.
    The shares add up to exactly ``min(capacity, total demand)``. Units that do not divide go to the largest
    remainders, then by tenant id.

    Raises:
        InvalidRequestError: a negative demand or capacity, or a weight outside 1 .. 2**32 - 1.
    """
    if capacity < 0 or any(demand < 0 or not 0 < weights[tenant] < 1 << 32 for tenant, demand in demands.items()):
        raise InvalidRequestError("demands and capacity must not be negative, and weights lie within 1 .. 2**32 - 1")
    # Demand over weight in 64 binary places: two such quotients that differ, differ by more than that.
    order = sorted(demands, key=lambda tenant: ((demands[tenant] << 64) // weights[tenant], tenant))
    left, weight_left = capacity, sum(weights[tenant] for tenant in demands)
    shares: dict[TenantId, int] = {}
    for place, tenant in enumerate(order):
        if demands[tenant] * weight_left > left * weights[tenant]:
            shares.update(_proportional(order[place:], weights, left, weight_left))
            break
        shares[tenant] = demands[tenant]
        left -= demands[tenant]
        weight_left -= weights[tenant]
    return {tenant: shares[tenant] for tenant in demands}


def _proportional(
    tenants: list[TenantId], weights: Mapping[TenantId, int], amount: int, weight_total: int
) -> dict[TenantId, int]:
    """Split ``amount`` by weight, largest remainders first, among tenants that are short."""
    shares = {tenant: amount * weights[tenant] // weight_total for tenant in tenants}
    spare = amount - sum(shares.values())
    by_remainder = sorted(tenants, key=lambda tenant: (-(amount * weights[tenant] % weight_total), tenant))
    for tenant in by_remainder[:spare]:
        shares[tenant] += 1
    return shares
