"""Flag commands: each accepted command becomes one change in the log, and the new state of one setting.

A tenant's setting is known in its tenant's partition; a global one is sent to every partition, in the same transaction.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import msgspec

from settler_streams.core.dedup import SeenIds, SeenWindow
from settler_streams.core.erasure import Erased, erased_tenants, forgotten
from settler_streams.core.flags import FlagSetting, setting_key
from settler_streams.core.fold import (
    NOTHING,
    Emit,
    FoldClock,
    FoldLogic,
    Outcome,
    Record,
    State,
    Tombstone,
    Value,
    value_of,
)
from settler_streams.errors import RecordError
from settler_streams.events import FlagAction, FlagChanged, FlagCommand, FlagScope, FlagState, TenantErased
from settler_streams.events.flags import EVERYONE_PER_MILLE
from settler_streams.ids import PLATFORM

GLOBAL_KEY = "*"
"""Key of commands and changes that concern every tenant."""
SETTINGS_MAX = 10_000
"""Of one tenant and its users, the deleted ones included: they keep their versions. The platform's own, which no tenant
can make, have no bound."""


class FlagCommands(FoldLogic):
    """The flags fold of one partition; the only writer of flag changes and flag state."""

    kinds: ClassVar[dict[str, type[Value]]] = {
        "clock": FoldClock,
        "flag": FlagSetting,
        "seen": SeenIds,
        "erased": Erased,
    }

    def __init__(self, state: State, partitions: int) -> None:
        self._state = state
        self._partitions = partitions
        self._seen = SeenWindow(state)
        self._erased = erased_tenants(state)
        self._settings = Counter(value.tenant for value in state.values() if isinstance(value, FlagSetting))

    def decide(self, record: Record, now_ms: int) -> Outcome:
        """Accept one command; see :class:`~settler_streams.core.fold.FoldLogic`.

        Raises:
            RecordError: ``too-many-flags``, the command would make one setting too many, if only to delete it;
                ``flag-scope``, ``misplaced``, and ``id-conflict``.
        """
        command, tenant = record.event.data, record.event.tenantid
        if isinstance(command, TenantErased):
            return self._erase(record, command)
        if not isinstance(command, FlagCommand):
            raise RecordError("misplaced", f"the flags fold has no use for {record.event.type}")
        _check_scope(record, command)
        if tenant in self._erased or self._seen.repeated(record, now_ms):
            return NOTHING
        key = f"flag/{command.flag}/{tenant}/{command.user_id or ''}"
        current = value_of(self._state, key, FlagSetting)
        if current is None:
            if tenant != PLATFORM and self._settings[tenant] >= SETTINGS_MAX:
                raise RecordError("too-many-flags", f"{tenant} has {SETTINGS_MAX} flag settings, deleted ones included")
            self._settings[tenant] += 1
        setting = _next_setting(command, current, record, now_ms)
        self._seen.remember(record, now_ms)
        emits = [Emit("flag-changes", _change(command, setting), tenant, record.key, "changed", command.flag)]
        state = _state(command, setting)
        state_key = _state_key(setting)
        everywhere = range(self._partitions) if command.scope is FlagScope.GLOBAL else (record.partition,)
        emits += [
            Emit("flag-state", state, tenant, state_key, f"state/{partition}", command.flag, partition=partition)
            for partition in everywhere
        ]
        return Outcome({key: setting}, tuple(emits))

    def _erase(self, record: Record, erased: TenantErased) -> Outcome:
        """Keep nothing of a tenant, here and in the compacted state. A repetition is answered again."""
        tenant = record.event.tenantid
        if tenant not in self._erased:
            self._seen.disown(tenant, self._state)
        self._erased.add(tenant)
        del self._settings[tenant]  # a Counter's, which needs no such key
        settings = [v for v in self._state.values() if isinstance(v, FlagSetting) and v.tenant == tenant]
        changes: dict[str, Value | None] = {setting_key(setting): None for setting in settings}
        keys = sorted(_state_key(setting) for setting in settings)
        return Outcome(
            {**changes, f"erased/{tenant}": Erased(erased.version)},
            (forgotten(record, erased, "flags", record.partition),),
            tuple(Tombstone("flag-state", key, record.partition) for key in keys),
        )

    def settle(self) -> Outcome:
        """The ids that a step has remembered are stored together."""
        return Outcome(self._seen.settle())


def _state_key(setting: FlagSetting) -> str:
    """Under which compaction keeps the newest state of a setting."""
    return f"{setting.flag}|{setting.tenant}|{setting.user_id or ''}"


def _check_scope(record: Record, command: FlagCommand) -> None:
    is_global = record.event.tenantid == PLATFORM
    if (command.scope is FlagScope.GLOBAL) != is_global or (record.key == GLOBAL_KEY) != is_global:
        raise RecordError("flag-scope", "a global flag belongs to the platform and has the key *; no other flag does")
    if (command.scope is FlagScope.USER) != (command.user_id is not None):
        raise RecordError("flag-scope", "the scope `user`, and no other, names a user")


def _next_setting(command: FlagCommand, current: FlagSetting | None, record: Record, now_ms: int) -> FlagSetting:
    """The setting after ``command``. A kill keeps the rest of the setting, so that reviving restores it.

    Where nothing was set, a kill leaves a switch alone: reviving must not turn on what nobody has turned on.
    """
    version = (current.version if current else 0) + 1
    if command.action in (FlagAction.KILL, FlagAction.REVIVE):
        base = current or _new_setting(command, record, version, now_ms)
        killed = command.action is FlagAction.KILL
        return msgspec.structs.replace(base, version=version, killed=killed, changed_at_ms=now_ms)
    setting = _new_setting(command, record, version, now_ms)
    killed = current.killed if current and command.action is FlagAction.SET else False
    return msgspec.structs.replace(setting, killed=killed)


def _new_setting(command: FlagCommand, record: Record, version: int, now_ms: int) -> FlagSetting:
    return FlagSetting(
        command.flag,
        command.scope,
        record.event.tenantid,
        command.user_id,
        version,
        command.enabled,
        False,
        command.rollout_per_mille,
        command.salt,
        now_ms,
        command.action is not FlagAction.SET,
    )


def _rollout(setting: FlagSetting) -> int:
    """The rollout to publish; written the same whether the setting was just made or read back from the changelog."""
    return EVERYONE_PER_MILLE if setting.rollout_per_mille == EVERYONE_PER_MILLE else setting.rollout_per_mille


def _change(command: FlagCommand, setting: FlagSetting) -> FlagChanged:
    return FlagChanged(
        flag=command.flag,
        scope=command.scope,
        action=command.action,
        actor=command.actor,
        version=setting.version,
        changed_at_ms=setting.changed_at_ms,
        user_id=command.user_id,
        enabled=setting.enabled,
        killed=setting.killed,
        deleted=setting.deleted,
        rollout_per_mille=_rollout(setting),
        salt=setting.salt,
        reason=command.reason,
    )


def _state(command: FlagCommand, setting: FlagSetting) -> FlagState:
    return FlagState(
        flag=command.flag,
        scope=command.scope,
        version=setting.version,
        changed_at_ms=setting.changed_at_ms,
        user_id=command.user_id,
        enabled=setting.enabled,
        killed=setting.killed,
        deleted=setting.deleted,
        rollout_per_mille=_rollout(setting),
        salt=setting.salt,
    )
