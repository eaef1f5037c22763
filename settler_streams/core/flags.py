"""Feature flags: which setting of a flag holds for a tenant and a user, and why.

Precedence: a kill switch in any scope that applies, then the user's setting, the tenant's, its parents' (nearest
first), the platform's. A percentage rollout hashes the targeting key in integers (the form of OpenFeature's flagd):
``murmur3_32(salt + flag + key) * 1000 >> 32``, so raising the percentage only adds users.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mmh3

from settler_streams.core.fold import Value
from settler_streams.events import FlagScope, FlagState
from settler_streams.ids import PLATFORM, TenantId


class FlagSetting(Value, frozen=True, array_like=True):
    """How a flag stands in one scope. ``tenant`` is the platform for a global setting.

    ``deleted`` says that there is no setting here; a kill switch holds all the same.
    """

    flag: str
    scope: FlagScope
    tenant: TenantId
    user_id: str | None
    version: int
    enabled: bool
    killed: bool
    rollout_per_mille: int
    salt: str
    changed_at_ms: int = 0
    deleted: bool = False


def setting_key(setting: FlagSetting) -> str:
    """Under which a fold keeps a setting."""
    return f"flag/{setting.flag}/{setting.tenant}/{setting.user_id or ''}"


def setting_of(tenant: TenantId, state: FlagState) -> FlagSetting:
    """The setting that a flag's published state tells of."""
    return FlagSetting(
        state.flag,
        state.scope,
        tenant,
        state.user_id,
        state.version,
        state.enabled,
        state.killed,
        state.rollout_per_mille,
        state.salt,
        state.changed_at_ms,
        state.deleted,
    )


class FlagReason(enum.StrEnum):
    """Why an evaluation came out as it did (OpenFeature's reasons where it has one)."""

    KILLED = "KILLED"
    TARGETING_MATCH = "TARGETING_MATCH"
    SPLIT = "SPLIT"
    STATIC = "STATIC"
    DISABLED = "DISABLED"
    DEFAULT = "DEFAULT"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answer, its reason, and the version of the setting it came from (0: the caller's default)."""

    enabled: bool
    reason: FlagReason
    version: int = 0


_DEFAULT_ON, _DEFAULT_OFF = (Evaluation(default, FlagReason.DEFAULT) for default in (True, False))

SettingKey = tuple[str, TenantId, str | None]


def in_rollout(salt: str, flag: str, targeting_key: str, rollout_per_mille: int) -> bool:
    """Whether ``targeting_key`` lies within the first ``rollout_per_mille`` thousandths of the hash space."""
    bucket = mmh3.hash((salt + flag + targeting_key).encode(), signed=False) * 1000 >> 32
    return bucket < rollout_per_mille


class FlagTable:
    """The settings at hand, indexed by flag, tenant and user. Evaluating is a few dictionary look-ups."""

    def __init__(self, settings: Iterable[FlagSetting] = ()) -> None:
        self._settings: dict[SettingKey, FlagSetting] = {}
        self.named: set[str] = set()
        """Flags that have a setting in any scope; what no scope has set is at its default."""
        for setting in settings:
            self.put(setting)

    def put(self, setting: FlagSetting) -> None:
        """Take a setting; an older version than the one at hand is passed over."""
        key = (setting.flag, setting.tenant, setting.user_id)
        current = self._settings.get(key)
        if current is None or setting.version >= current.version:
            self._settings[key] = setting
            self.named.add(setting.flag)

    def forget(self, tenant: TenantId) -> list[FlagSetting]:
        """Drop every setting of ``tenant`` and its users; returns them."""
        dropped = [setting for setting in self._settings.values() if setting.tenant == tenant]
        for setting in dropped:
            del self._settings[setting.flag, setting.tenant, setting.user_id]
        return dropped

    def get(self, flag: str, tenant: TenantId, user_id: str | None) -> FlagSetting | None:
        """The setting of exactly this scope."""
        return self._settings.get((flag, tenant, user_id))

    def evaluate(
        self, flag: str, chain: Sequence[TenantId], user_id: str | None = None, *, default: bool = False
    ) -> Evaluation:
        """Evaluate for the tenant ``chain[0]`` whose parents follow in order; ``default`` holds when nothing is set."""
        if flag not in self.named:
            return _DEFAULT_ON if default else _DEFAULT_OFF
        scopes: list[tuple[TenantId, str | None]] = [(tenant, None) for tenant in (*chain, PLATFORM)]
        if user_id is not None:
            scopes.insert(0, (chain[0], user_id))
        found = [s for scope in scopes if (s := self._settings.get((flag, *scope))) is not None]
        for setting in found:
            if setting.killed:
                return Evaluation(False, FlagReason.KILLED, setting.version)
        for setting in found:
            if not setting.deleted:
                return _answer(setting, user_id or chain[0])
        return Evaluation(default, FlagReason.DEFAULT)


def _answer(setting: FlagSetting, targeting_key: str) -> Evaluation:
    if not setting.enabled:
        return Evaluation(False, FlagReason.DISABLED, setting.version)
    if setting.rollout_per_mille < 1000:
        hit = in_rollout(setting.salt, setting.flag, targeting_key, setting.rollout_per_mille)
        return Evaluation(hit, FlagReason.SPLIT, setting.version)
    reason = FlagReason.TARGETING_MATCH if setting.scope is FlagScope.USER else FlagReason.STATIC
    return Evaluation(True, reason, setting.version)
