"""The adaptive token bucket: how much a tenant may ask for per minute.

Theory. The level is counted in units of ``1 / UNITS_PER_TOKEN`` token. ``UNITS_PER_TOKEN`` is the number of
milliseconds in a minute times one thousand, so that any whole rate per minute, with any whole per-mille of its surplus,
refills a whole number of units in each millisecond. Nothing is ever rounded, so no sequence of calls can gain or lose a
token.

Claim. Under one policy, the cost admitted in any window of ``D`` ms is at most ``burst + rate * D / 60000`` tokens.
A denial consumes nothing and returns the very bucket that it was given.

Pressure may scale only what lies above the contracted floor: the refill is
``floor + (rate - floor) * surplus_per_mille / 1000`` tokens per minute, never less than the floor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from settler_streams.errors import ConfigurationError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS_PER_TOKEN = 60_000 * 1_000
"""Milliseconds per minute times per-mille: the smallest unit in which every refill is a whole number."""


class RatePolicy(msgspec.Struct, frozen=True, array_like=True):
    """A rate limit: tokens per minute above a guaranteed floor, and the most that may be saved up.

    ``surplus_per_mille`` (0..1000) is the part of the surplus above the floor that the platform can bear now.

    Raises:
        ConfigurationError: a rate is negative, the floor is above the rate, or the burst is below one token.
    """

    rate_per_minute: int
    burst: int
    floor_per_minute: int = 0
    surplus_per_mille: int = 1_000

    def __post_init__(self) -> None:
        if not 0 <= self.floor_per_minute <= self.rate_per_minute:
            raise ConfigurationError(f"floor must lie within 0..rate, which {self} does not hold")
        if self.burst < 1 or not 0 <= self.surplus_per_mille <= 1_000:
            raise ConfigurationError(f"burst must be at least 1 and the surplus within 0..1000, not {self}")

    def capacity(self) -> int:
        """Units that may be saved up."""
        return self.burst * UNITS_PER_TOKEN

    def refill_per_ms(self) -> int:
        """Units that flow in per millisecond."""
        floor = self.floor_per_minute
        return floor * 1_000 + (self.rate_per_minute - floor) * self.surplus_per_mille


class Bucket(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is left (in units) as of ``updated_ms``; what flowed in since is computed, never stored."""

    level: int
    updated_ms: int


class Verdict(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to one request.

    ``remaining`` counts whole tokens after it. ``retry_after_ms`` is exact: with no other take, the same request is
    refused one millisecond earlier and allowed at it; None means never under this policy. ``denied_by`` is the place
    in the chain of the bucket that holds the request back longest, or -1.
    """

    allowed: bool
    remaining: int
    retry_after_ms: int | None = 0
    denied_by: int = -1


def full(policy: RatePolicy, now_ms: int) -> Bucket:
    """A new tenant's bucket."""
    return Bucket(policy.burst * UNITS_PER_TOKEN, now_ms)


def empty(now_ms: int) -> Bucket:
    """A bucket that has to earn its first token: for a share that starts without knowing what was spent elsewhere."""
    return Bucket(0, now_ms)


def is_full(bucket: Bucket, policy: RatePolicy, now_ms: int) -> bool:
    """Whether the bucket equals a new one, so that its owner may forget it."""
    return _level(bucket, policy, now_ms) == policy.burst * UNITS_PER_TOKEN


def take(bucket: Bucket, policy: RatePolicy, cost: int, now_ms: int) -> tuple[Bucket, Verdict]:
    """Charge ``cost`` tokens at ``now_ms``, or refuse and leave the bucket as it is.

    A clock that went back refills nothing and loses nothing: the bucket stays at the latest time it has seen.

    Raises:
        InvalidRequestError: ``cost`` is below one token (a negative cost would mint tokens).
    """
    if cost < 1:
        raise InvalidRequestError(f"cost must be at least one token, not {cost}")
    level = _level(bucket, policy, now_ms)
    updated_ms = max(now_ms, bucket.updated_ms)
    left = level - cost * UNITS_PER_TOKEN
    if left >= 0:
        return Bucket(left, updated_ms), Verdict(True, left // UNITS_PER_TOKEN)
    retry_after_ms = _retry_after_ms(bucket, policy, cost, now_ms)
    return bucket, Verdict(False, level // UNITS_PER_TOKEN, retry_after_ms, 0)


def take_all(
    buckets: Sequence[Bucket], policies: Sequence[RatePolicy], cost: int, now_ms: int
) -> tuple[tuple[Bucket, ...], Verdict]:
    """Charge every bucket of a chain (child, parent, root), or none of them.

    ``remaining`` is the least of the chain; a refusal waits for the slowest level, which ``denied_by`` names.

    Raises:
        InvalidRequestError: ``cost`` is below one token, or the chain is empty or differs in length from its policies.
    """
    if not buckets or len(buckets) != len(policies):
        raise InvalidRequestError(f"{len(buckets)} buckets cannot be charged under {len(policies)} policies")
    taken: list[Bucket] = []
    remaining = policies[0].burst
    for bucket, policy in zip(buckets, policies, strict=True):
        after, verdict = take(bucket, policy, cost, now_ms)
        if not verdict.allowed:
            return tuple(buckets), _chain_denial(buckets, policies, cost, now_ms)
        taken.append(after)
        remaining = min(remaining, verdict.remaining)
    return tuple(taken), Verdict(True, remaining)


def _chain_denial(buckets: Sequence[Bucket], policies: Sequence[RatePolicy], cost: int, now_ms: int) -> Verdict:
    answers = [take(bucket, policy, cost, now_ms)[1] for bucket, policy in zip(buckets, policies, strict=True)]
    remaining = min(answer.remaining for answer in answers)
    slowest, longest_ms = -1, -1
    for level, answer in enumerate(answers):
        if answer.retry_after_ms is None:
            return Verdict(False, remaining, None, level)
        if answer.retry_after_ms > longest_ms:
            slowest, longest_ms = level, answer.retry_after_ms
    return Verdict(False, remaining, longest_ms, slowest)


def change_policy(bucket: Bucket, old: RatePolicy, new: RatePolicy, now_ms: int) -> Bucket:
    """Settle the bucket under the policy that ruled until ``now_ms``, so that the new rate pays for no past time.

    Call it whenever a policy changes, pressure included. A higher burst starts empty above the old level; a lower one
    cuts the level.
    """
    level = _level(bucket, old, now_ms)
    return Bucket(min(level, new.burst * UNITS_PER_TOKEN), max(now_ms, bucket.updated_ms))


def _level(bucket: Bucket, policy: RatePolicy, now_ms: int) -> int:
    elapsed_ms = max(0, now_ms - bucket.updated_ms)
    return min(policy.burst * UNITS_PER_TOKEN, bucket.level + elapsed_ms * policy.refill_per_ms())


def _retry_after_ms(bucket: Bucket, policy: RatePolicy, cost: int, now_ms: int) -> int | None:
    refill = policy.refill_per_ms()
    if cost > policy.burst or refill == 0:
        return None
    missing = cost * UNITS_PER_TOKEN - bucket.level
    return -(-missing // refill) + bucket.updated_ms - now_ms
