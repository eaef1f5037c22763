"""Flag evaluation: the precedence table, and rollouts that are uniform, monotone and equal on every machine."""

from __future__ import annotations

import itertools

import mmh3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core.flags import Evaluation, FlagReason, FlagSetting, FlagTable, in_rollout
from settler_streams.events import FlagScope
from settler_streams.ids import PLATFORM, TenantId

CHILD, PARENT, ROOT, OTHER = (TenantId(name) for name in ("child", "parent", "root", "other"))
CHAIN = (CHILD, PARENT, ROOT)
USER = "user-1"
SCOPES = ((CHILD, USER), (CHILD, None), (PARENT, None), (ROOT, None), (PLATFORM, None))


def setting(tenant=PLATFORM, user_id=None, **changes):
    scope = FlagScope.USER if user_id else FlagScope.GLOBAL if tenant == PLATFORM else FlagScope.TENANT
    given = {"version": 1, "enabled": True, "killed": False, "rollout_per_mille": 1000, "salt": ""} | changes
    return FlagSetting(given.pop("flag", "f"), scope, tenant, user_id, **given)


def oracle(standing, user_id, default):
    """The specification read aloud: ``standing`` maps a scope to absent, on, off, killed or a rollout of nobody."""
    applying = [s for s in SCOPES if standing[s] != "absent" and (s[1] is None or s[1] == user_id)]
    if any(standing[s] in ("killed", "killed-deleted") for s in applying):
        return False, FlagReason.KILLED
    for scope in applying:
        match standing[scope]:
            case "on":
                return True, FlagReason.TARGETING_MATCH if scope[1] else FlagReason.STATIC
            case "off":
                return False, FlagReason.DISABLED
            case "nobody":
                return False, FlagReason.SPLIT
    return default, FlagReason.DEFAULT


FORMS = {
    "on": {},
    "off": {"enabled": False},
    "nobody": {"rollout_per_mille": 0},
    "killed": {"killed": True},
    "killed-deleted": {"killed": True, "deleted": True},
    "deleted": {"deleted": True},
}


@pytest.mark.parametrize("user_id", [USER, None, "user-2"])
@pytest.mark.parametrize("default", [True, False])
def test_precedence_over_every_combination_of_scopes(user_id, default):
    """Kill switch, user, tenant, parents nearest first, platform: all 7 ** 5 ways in which five scopes can stand."""
    for combination in itertools.product(("absent", *FORMS), repeat=len(SCOPES)):
        standing = dict(zip(SCOPES, combination, strict=True))
        table = FlagTable(setting(*scope, **FORMS[form]) for scope, form in standing.items() if form != "absent")
        answer = table.evaluate("f", CHAIN, user_id, default=default)
        assert (answer.enabled, answer.reason) == oracle(standing, user_id, default), standing


def test_the_answer_names_the_version_of_the_setting_it_came_from():
    table = FlagTable([setting(version=7), setting(CHILD, version=3), setting(CHILD, USER, version=5)])
    assert table.evaluate("f", CHAIN, USER).version == 5
    assert table.evaluate("f", CHAIN).version == 3
    assert table.evaluate("f", (OTHER,)).version == 7
    assert table.evaluate("g", CHAIN) == Evaluation(False, FlagReason.DEFAULT, 0)
    assert FlagTable().evaluate("f", CHAIN, default=True) == Evaluation(True, FlagReason.DEFAULT, 0)


def test_a_users_setting_belongs_to_the_users_own_tenant():
    table = FlagTable([setting(PARENT, USER, enabled=False)])
    assert table.evaluate("f", CHAIN, USER, default=True).reason is FlagReason.DEFAULT


@settings(max_examples=200, deadline=None)
@given(st.permutations([1, 2, 3, 4]))
def test_the_newest_version_stands_in_whatever_order_settings_arrive(order):
    table = FlagTable()
    for version in order:
        table.put(setting(version=version))
    current = table.get("f", PLATFORM, None)
    assert current is not None
    assert current.version == 4


GOLDEN = [
    # salt, flag, targeting key, thousandth
    ("", "new-matcher", "tenant-1", 381),
    ("", "new-matcher", "tenant-2", 95),
    ("s1", "new-matcher", "tenant-1", 403),
    ("", "jobs.reconciliation", "0192f0c0-0000-7000-8000-000000000001", 746),
    ("", "f", "", 169),
    ("Salz", "Fähre", "Schlüssel", 839),
]


def murmur3_32(text):
    """MurmurHash3 x86 32 bit with seed 0, written from its definition."""
    data = text.encode()
    mask = 0xFFFFFFFF

    def rotate(value, by):
        return (value << by | value >> (32 - by)) & mask

    def mix(k):
        return rotate(k * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask

    h = 0
    whole = len(data) // 4 * 4
    for start in range(0, whole, 4):
        h = rotate(h ^ mix(int.from_bytes(data[start : start + 4], "little")), 13) * 5 + 0xE6546B64 & mask
    if data[whole:]:
        h ^= mix(int.from_bytes(data[whole:], "little"))
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


@pytest.mark.parametrize(("salt", "flag", "key", "thousandth"), GOLDEN)
def test_golden_vectors(salt, flag, key, thousandth):
    """A key enters at one percentage, on every machine and in every release: these figures never change."""
    assert not in_rollout(salt, flag, key, thousandth)
    assert in_rollout(salt, flag, key, thousandth + 1)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(0, 1000))
def test_the_bucket_is_that_of_the_published_hash(key, per_mille):
    assert mmh3.hash(key.encode(), signed=False) == murmur3_32(key)
    assert in_rollout("s", "f", key, per_mille) == (murmur3_32("sf" + key) / 2**32 < per_mille / 1000)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(0, 999))
def test_raising_the_percentage_only_adds(key, per_mille):
    assert not in_rollout("s", "f", key, 0)
    assert in_rollout("s", "f", key, 1000)
    assert in_rollout("s", "f", key, per_mille) <= in_rollout("s", "f", key, per_mille + 1)


def chi_square(observed, expected):
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


KEYS = [f"user-{n}" for n in range(20_000)]


def share(flag, per_mille, key):
    return in_rollout("", flag, key, per_mille)


def test_a_rollout_is_uniform():
    """20,000 keys into ten tenths; 27.88 is the 99.9 % point of chi-square with nine degrees of freedom."""
    tenths = [0] * 10
    for key in KEYS:
        tenths[next(t for t in range(10) if share("f", 100 * (t + 1), key))] += 1
    assert sum(tenths) == len(KEYS)
    assert chi_square(tenths, [len(KEYS) / 10] * 10) < 27.88


def test_two_flags_split_independently():
    """Of the half that has one flag, half has the other; 10.83 is the 99.9 % point with one degree of freedom."""
    table = [0] * 4
    for key in KEYS:
        table[2 * share("f", 500, key) + share("g", 500, key)] += 1
    first, second = table[2] + table[3], table[1] + table[3]
    n = len(KEYS)
    expected = [(n - first) * (n - second) / n, (n - first) * second / n, first * (n - second) / n, first * second / n]
    assert chi_square(table, expected) < 10.83


def test_a_rollout_hashes_the_user_or_else_the_tenant():
    table = FlagTable([setting(rollout_per_mille=500)])
    for n in range(200):
        user = f"user-{n}"
        assert table.evaluate("f", CHAIN, user).enabled == in_rollout("", "f", user, 500)
        tenant = TenantId(f"tenant-{n}")
        assert table.evaluate("f", (tenant, ROOT)).enabled == in_rollout("", "f", tenant, 500)
