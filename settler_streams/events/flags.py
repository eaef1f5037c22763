"""Events about feature flags: what was asked for, what was accepted, and how things stand."""

from __future__ import annotations

from settler_streams.events.fields import Count, FlagAction, FlagScope, Millis, Name, PerMille, Text, Uuid
from settler_streams.events.structs import Part, event

EVERYONE_PER_MILLE = 1000
"""The default of ``rollout_per_mille``. The encoder leaves out what *is* the default, not what only equals it. Whoever
copies a rollout that was read from somewhere names this object, or equal events would differ in their bytes."""


@event("settler.flag.command.v1")
class FlagCommand(Part):
    """Someone wants a flag changed. The envelope's ``tenantid`` is the tenant, or the platform for a global flag."""

    flag: Name
    scope: FlagScope
    action: FlagAction
    actor: Text
    user_id: Uuid | None = None
    enabled: bool = True
    rollout_per_mille: PerMille = EVERYONE_PER_MILLE
    salt: Text = ""
    reason: Text = ""


@event("settler.flag.changed.v1")
class FlagChanged(Part):
    """An accepted change, kept for ever: the audit log, and the base of every past evaluation."""

    flag: Name
    scope: FlagScope
    action: FlagAction
    actor: Text
    version: Count
    changed_at_ms: Millis
    user_id: Uuid | None = None
    enabled: bool = True
    killed: bool = False
    deleted: bool = False
    rollout_per_mille: PerMille = EVERYONE_PER_MILLE
    salt: Text = ""
    reason: Text = ""


@event("settler.flag.state.v1")
class FlagState(Part):
    """How a flag stands in one scope; the compacted topic holds the newest of each."""

    flag: Name
    scope: FlagScope
    version: Count
    changed_at_ms: Millis
    user_id: Uuid | None = None
    enabled: bool = True
    killed: bool = False
    deleted: bool = False
    rollout_per_mille: PerMille = EVERYONE_PER_MILLE
    salt: Text = ""
