"""Feature flags: evaluated in memory, changed by commands.

Every process holds all settings, kept fresh from the compacted topic ``flag-state``. Evaluating neither waits nor does
I/O; the table changes only between two evaluations. When the feed is lost the last known settings still answer, and
say so: the reason is ``STALE`` (OpenFeature's word). The precedence is that of :mod:`settler_streams.core.flags`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from settler_streams.core.flags import FlagReason, FlagSetting, FlagTable
from settler_streams.errors import NotFoundError
from settler_streams.events import Envelope, FlagAction, FlagCommand, FlagScope, FlagState, Part
from settler_streams.ids import PLATFORM, TenantId
from settler_streams.services.directory import TenantDirectory
from settler_streams.services.feed import TopicFeed
from settler_streams.services.publisher import EventPublisher
from settler_streams.settings import Settings


class AnswerReason(enum.StrEnum):
    """Why an answer is not simply an evaluation."""

    STALE = "STALE"


@dataclass(frozen=True, slots=True)
class FlagAnswer:
    """The answer, why, and the version of the setting it came from (0: the caller's default)."""

    enabled: bool
    reason: FlagReason | AnswerReason
    version: int


class FeatureFlagService:
    """Flags of every tenant. One per process; ``directory`` tells it each tenant's parents."""

    def __init__(self, settings: Settings, directory: TenantDirectory, publisher: EventPublisher) -> None:
        self._directory = directory
        self._publisher = publisher
        self._table = FlagTable()
        directory.follow(self._tenant_changed)
        self.feed = TopicFeed(settings, "flag-state", self._changed, start="beginning")

    async def start(self) -> None:
        """Load every setting, then keep up. Raises UnavailableError as :meth:`TopicFeed.start`."""
        await self.feed.start()

    async def stop(self) -> None:
        """Stop keeping up."""
        await self.feed.stop()

    async def is_enabled(
        self, flag: str, tenant_id: TenantId, user_id: str | None = None, *, default: bool = False
    ) -> bool:
        """Whether ``flag`` is on for the tenant, or for one of its users; ``default`` when nobody has set it."""
        return self.evaluate(flag, tenant_id, user_id, default=default).enabled

    def evaluate(
        self, flag: str, tenant_id: TenantId, user_id: str | None = None, *, default: bool = False
    ) -> FlagAnswer:
        """As :meth:`is_enabled`, with the reason."""
        chain = self._directory.chain(tenant_id)
        found = self._table.evaluate(flag, chain, user_id, default=default)
        stale = self.feed.stale or self._directory.feed.stale
        return FlagAnswer(found.enabled, AnswerReason.STALE if stale else found.reason, found.version)

    async def set_flag(
        self,
        flag: str,
        tenant_id: TenantId = PLATFORM,
        *,
        actor: str,
        enabled: bool = True,
        rollout_per_mille: int = 1000,
        user_id: str | None = None,
        salt: str = "",
        reason: str = "",
    ) -> None:
        """Ask for a setting of a tenant, one of its users, or (the platform's) of everyone.

        Returns once the command is stored; it takes effect when the flags agent has accepted it, within a second.

        Raises:
            NotFoundError: there is no such tenant.
            UnavailableError: it is unknown whether the command was stored; sending it again is harmless.
        """
        command = FlagCommand(
            flag=flag,
            scope=_scope(tenant_id, user_id),
            action=FlagAction.SET,
            actor=actor,
            user_id=user_id,
            enabled=enabled,
            rollout_per_mille=rollout_per_mille,
            salt=salt,
            reason=reason,
        )
        await self.send(tenant_id, command)

    async def kill(self, flag: str, tenant_id: TenantId = PLATFORM, *, actor: str, reason: str) -> None:
        """Switch a flag off at once, whatever else is set. Errors as :meth:`set_flag`."""
        await self._switch(flag, tenant_id, FlagAction.KILL, actor, reason)

    async def revive(self, flag: str, tenant_id: TenantId = PLATFORM, *, actor: str, reason: str) -> None:
        """Take a kill back; what was set before holds again. Errors as :meth:`set_flag`."""
        await self._switch(flag, tenant_id, FlagAction.REVIVE, actor, reason)

    async def send(self, tenant_id: TenantId, command: FlagCommand) -> str:
        """Publish a command as it is; returns its id. Errors as :meth:`set_flag`."""
        root = PLATFORM if tenant_id == PLATFORM else (await self._directory.find(tenant_id)).root_id
        return await self._publisher.publish("flag-commands", tenant_id, root, command)

    async def _switch(self, flag: str, tenant_id: TenantId, action: FlagAction, actor: str, reason: str) -> None:
        scope = _scope(tenant_id, None)
        await self.send(tenant_id, FlagCommand(flag=flag, scope=scope, action=action, actor=actor, reason=reason))

    def _changed(self, event: Envelope[Part]) -> None:
        state = event.data
        if not isinstance(state, FlagState) or self._directory.is_erased(event.tenantid):
            return
        setting = FlagSetting(
            state.flag,
            state.scope,
            event.tenantid,
            state.user_id,
            state.version,
            state.enabled,
            state.killed,
            state.rollout_per_mille,
            state.salt,
            state.changed_at_ms,
            state.deleted,
        )
        self._table.put(setting)

    def _tenant_changed(self, tenant_id: TenantId, _version: int) -> None:
        if self._directory.is_erased(tenant_id):
            self._table.forget(tenant_id)


def _scope(tenant_id: TenantId, user_id: str | None) -> FlagScope:
    if tenant_id == PLATFORM:
        if user_id is not None:
            raise NotFoundError("the platform has no users: name the user's tenant")
        return FlagScope.GLOBAL
    return FlagScope.TENANT if user_id is None else FlagScope.USER
