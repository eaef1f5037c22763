"""Flag commands: each is accepted once, versions only grow, and a kill is never lost nor turned into an "on"."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from settler_streams.core import flag_commands
from settler_streams.core.flag_commands import GLOBAL_KEY, FlagCommands
from settler_streams.core.flags import FlagReason, FlagTable, setting_of
from settler_streams.events import ClockTick, FlagAction, FlagChanged, FlagCommand, FlagScope, FlagState
from settler_streams.ids import PLATFORM
from tests.core.harness import Fold, uid

PARTITIONS = 4
TENANT, USER = uid("tenant"), uid("user")


def new_fold():
    return Fold(lambda state: FlagCommands(state, PARTITIONS), partition=2)


def send(fold, action, scope=FlagScope.TENANT, **where):
    tenant = where.pop("tenant", PLATFORM if scope is FlagScope.GLOBAL else TENANT)
    key = where.pop("key", GLOBAL_KEY if scope is FlagScope.GLOBAL else tenant)
    route = {name: where.pop(name) for name in ("event_id", "source") if name in where}
    user = where.pop("user_id", USER if scope is FlagScope.USER else None)
    flag = where.pop("flag", "f")
    command = FlagCommand(flag=flag, scope=scope, action=action, actor="ada", user_id=user, **where)
    return fold.feed(command, tenant, key=key, **route)


def table_of(fold):
    """What a process knows that has followed the flag state."""
    table = FlagTable()
    for emit in fold.emitted(FlagState):
        if emit.partition == fold.partition:
            table.put(setting_of(emit.tenant, emit.data))
    return table


def evaluate(fold, user_id=None, *, default=False):
    return table_of(fold).evaluate("f", (TENANT,), user_id, default=default)


def test_a_tenants_flag_is_known_in_its_own_partition_and_a_global_one_in_all():
    fold = new_fold()
    own = send(fold, FlagAction.SET)
    assert [emit.topic for emit in own] == ["flag-changes", "flag-state"]
    assert own[1].partition == fold.partition
    everywhere = send(fold, FlagAction.SET, FlagScope.GLOBAL)
    assert [emit.partition for emit in everywhere if emit.topic == "flag-state"] == list(range(PARTITIONS))
    assert len({emit.key for emit in everywhere[1:]} | {own[1].key}) == 2, "compaction keeps one value per scope"
    assert len({emit.data for emit in everywhere[1:]}) == 1


@pytest.mark.parametrize(
    ("scope", "where"),
    [
        (FlagScope.GLOBAL, {"tenant": TENANT}),
        (FlagScope.GLOBAL, {"key": PLATFORM}),
        (FlagScope.GLOBAL, {"user_id": USER}),
        (FlagScope.TENANT, {"tenant": PLATFORM, "key": GLOBAL_KEY}),
        (FlagScope.TENANT, {"key": GLOBAL_KEY}),
        (FlagScope.TENANT, {"user_id": USER}),
        (FlagScope.USER, {"user_id": None}),
        (FlagScope.USER, {"tenant": PLATFORM, "key": PLATFORM}),
    ],
)
def test_a_scope_that_contradicts_its_key_tenant_or_user_changes_nothing(scope, where):
    fold = new_fold()
    assert send(fold, FlagAction.SET, scope, **where) == ()
    assert fold.reasons() == ["flag-scope"]
    assert fold.stored() == {}


def test_only_commands_belong_here():
    fold = new_fold()
    fold.feed(ClockTick(role="x"))
    assert fold.reasons() == ["misplaced"]


def test_a_repeated_command_is_accepted_once_and_a_stolen_id_never():
    fold = new_fold()
    send(fold, FlagAction.SET, event_id=uid("c"))
    before = fold.stored()
    assert send(fold, FlagAction.KILL, event_id=uid("c")) == ()
    assert send(fold, FlagAction.KILL, event_id=uid("c"), source="/thief") == ()
    assert fold.reasons() == ["id-conflict"]
    assert fold.stored() == before


@pytest.mark.parametrize("action", FlagAction)
def test_a_tenant_has_a_bounded_number_of_settings_and_the_deleted_ones_count(monkeypatch, action):
    monkeypatch.setattr(flag_commands, "SETTINGS_MAX", 2)
    fold = new_fold()
    send(fold, FlagAction.SET)
    send(fold, FlagAction.SET, FlagScope.USER)
    send(fold, FlagAction.DELETE)
    before = fold.stored()
    for where in ({"flag": "g"}, {"scope": FlagScope.USER, "user_id": uid("another user")}):
        assert send(fold, action, **where) == ()
        fold.restart()
    assert fold.reasons() == ["too-many-flags"] * 2
    assert fold.stored() == before
    assert send(fold, action)[0].data.version == 3, "what is there can still be changed"
    assert send(fold, action, tenant=uid("another tenant"))
    assert all(send(fold, action, FlagScope.GLOBAL, flag=f"f{number}") for number in range(3))


def test_kill_and_revive_restore_the_setting():
    fold = new_fold()
    send(fold, FlagAction.SET, rollout_per_mille=0, salt="s")
    send(fold, FlagAction.KILL, rollout_per_mille=777)
    assert evaluate(fold, default=True).reason is FlagReason.KILLED
    send(fold, FlagAction.REVIVE, enabled=False)
    assert evaluate(fold).reason is FlagReason.SPLIT
    last = fold.emitted(FlagState)[-1].data
    assert (last.rollout_per_mille, last.salt, last.enabled, last.killed) == (0, "s", True, False)


def test_a_set_under_a_kill_switch_stays_killed_until_it_is_revived():
    fold = new_fold()
    send(fold, FlagAction.SET)
    send(fold, FlagAction.KILL)
    send(fold, FlagAction.SET, salt="new")
    assert evaluate(fold).reason is FlagReason.KILLED
    send(fold, FlagAction.REVIVE)
    assert evaluate(fold).enabled
    assert fold.emitted(FlagState)[-1].data.salt == "new"


@pytest.mark.parametrize("before", [(), (FlagAction.SET, FlagAction.DELETE)])
def test_a_kill_holds_where_nothing_is_set_and_reviving_turns_nothing_on(before):
    fold = new_fold()
    for action in before:
        send(fold, action)
    send(fold, FlagAction.KILL)
    assert evaluate(fold, default=True) == evaluate(fold)
    assert evaluate(fold).reason is FlagReason.KILLED
    send(fold, FlagAction.REVIVE)
    assert evaluate(fold).reason is FlagReason.DEFAULT
    send(fold, FlagAction.REVIVE)
    assert evaluate(fold).reason is FlagReason.DEFAULT


def test_a_deleted_setting_uncovers_the_wider_one():
    fold = new_fold()
    send(fold, FlagAction.SET, FlagScope.GLOBAL)
    send(fold, FlagAction.SET, enabled=False)
    assert evaluate(fold).reason is FlagReason.DISABLED
    send(fold, FlagAction.DELETE)
    assert evaluate(fold).reason is FlagReason.STATIC


class Model:
    """One scope, as a person would keep it on paper: what is set, and whether the switch is thrown."""

    def __init__(self):
        self.set, self.killed, self.version = None, False, 0

    def take(self, action, enabled, per_mille):
        self.version += 1
        if action is FlagAction.SET:
            self.set = (enabled, per_mille)
        elif action is FlagAction.DELETE:
            self.set, self.killed = None, False
        else:
            self.killed = action is FlagAction.KILL


commands = st.lists(
    st.tuples(
        st.sampled_from(FlagScope),
        st.sampled_from(FlagAction),
        st.booleans(),
        st.sampled_from([0, 1000]),
        st.booleans(),
        st.integers(0, 400_000),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(commands)
def test_any_sequence_of_commands_equals_the_model_and_survives_restarts(sequence):
    fold, twin = new_fold(), new_fold()
    models = {scope: Model() for scope in FlagScope}
    for number, (scope, action, enabled, per_mille, restart, later_ms) in enumerate(sequence):
        fold.now_ms = twin.now_ms = fold.now_ms + later_ms
        if restart:
            twin.restart()
        for one in (fold, twin):
            send(one, action, scope, enabled=enabled, rollout_per_mille=per_mille, event_id=uid(f"c{number}"))
        models[scope].take(action, enabled, per_mille)
        change = fold.emitted(FlagChanged)[-1].data
        assert change.version == models[scope].version
        assert (change.deleted, change.killed) == (models[scope].set is None, models[scope].killed)
    assert [o.emits for o in twin.outcomes] == [o.emits for o in fold.outcomes]
    assert twin.stored() == fold.stored()
    order = [models[scope] for scope in (FlagScope.USER, FlagScope.TENANT, FlagScope.GLOBAL)]
    wanted = next((m.set for m in order if m.set is not None), (True, 1000))
    on = not any(m.killed for m in order) and wanted == (True, 1000)
    assert evaluate(fold, USER, default=True).enabled == on


def test_a_change_is_written_alike_whether_the_setting_was_just_made_or_loaded():
    """The encoder leaves out what is the default; a rollout read from the changelog equals it and is another object."""
    written = []
    for restarted in (False, True):
        fold = new_fold()
        send(fold, FlagAction.SET)
        if restarted:
            fold.restart()
        kill = send(fold, FlagAction.KILL)
        written.append([msgspec.json.encode(emit.data) for emit in kill])
    assert written[0] == written[1]
