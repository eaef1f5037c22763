"""The topology: topics, folds and projections, loaded from ``topology/topics.yaml`` and checked once.

The program takes every topic name, partition count and input list from here; nothing else spells them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from settler_streams.errors import ConfigurationError
from settler_streams.events import REGISTRY
from settler_streams.published import TOPOLOGY

Slug = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
FOREVER_MS = -1
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_CHANGELOG_RETENTION_MS = FOREVER_MS
BROKER_LIMIT_FACTOR = 2
"""The broker takes records of twice the contract's size, so that an oversize one ends as a dead letter, bytes and all;
what is larger still, the broker refuses, and its producer learns at once."""
_JOURNAL_RETENTION_MS = 30 * _UNIT_MS["d"]
_COMPACTION_LAG_MS = _UNIT_MS["d"]
"""What a later record of its key replaces, or a tombstone deletes, does not outlast the next compaction: by default a
quiet partition would keep it for ever. A segment of that age is closed, too, by the first record after it."""
TOMBSTONES_MS = _UNIT_MS["d"]
"""How long a tombstone stays after its first compaction: Kafka's default, but a broker may have another one. To read
such a topic from its beginning has to take less than that, or what was deleted meanwhile seems to be there."""
_CHANGELOG_CONFIG = {"segment.bytes": str(64 * 2**20), "max.compaction.lag.ms": str(_UNIT_MS["h"])}
"""A changelog is read from end to end whenever its fold opens. What is superseded in closed segments goes once it is
half of the log, or an hour old; nothing goes of the open segment, which by default takes in 1 GiB. With 64 MiB there
are tens of segments in each of some thirty partitions even for gigabytes of state, of four files at most."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Topic(_Model):
    """One topic as declared. ``retention_ms`` is -1 for ever; ``partitions`` is resolved by :class:`Topology`."""

    name: Slug
    key: Literal["root-tenant", "partition", "state"]
    partitions: Literal["tenants", "pools"] | Annotated[int, Field(ge=1, le=1000)]
    retention_ms: int = Field(alias="retention")
    cleanup: Literal["delete", "compact", "compact,delete"] = "delete"
    max_message_bytes: Annotated[int, Field(ge=1024, le=16 * 2**20)] = 2**20
    events: tuple[str, ...]
    writers: tuple[Slug, ...]
    readers: tuple[Slug, ...]

    @field_validator("retention_ms", mode="before")
    @classmethod
    def _duration(cls, value: object) -> int:
        if value == "forever":
            return FOREVER_MS
        match = re.fullmatch(r"(\d+)([smhd])", str(value))
        if match is None:
            raise ValueError("a duration such as 7d, 12h or 30m, or `forever`")
        return int(match[1]) * _UNIT_MS[match[2]]


class Role(_Model):
    """What reads co-partitioned inputs, and how long a small batch of it waits for its step."""

    role: Slug
    inputs: tuple[Slug, ...]
    gather_ms: Annotated[int, Field(ge=0, le=1_000)] = 0


class Fold(Role):
    """A role with state, and the topic its owner appends clock ticks to."""

    tick: Slug | None = None

    @property
    def changelog(self) -> str:
        """Name of the compacted topic that holds the fold's state."""
        return f"{self.role}-changelog"

    @property
    def journal(self) -> str:
        """Name of the topic that says what each step consumed."""
        return f"{self.role}-journal"


class Projection(Role):
    """A role whose only state is its position in Postgres."""


class Declared(_Model):
    """A topic as the broker should have it: full name, partition count and configuration."""

    topic: str
    partitions: int
    config: dict[str, str]


class Topology(_Model):
    """The whole declaration. Lookups raise ``KeyError`` for names that are not declared."""

    version: Annotated[int, Field(ge=1, le=1)]
    tenant_partitions: Annotated[int, Field(ge=1, le=1000)]
    worker_pools: Annotated[int, Field(ge=1, le=100)]
    topics: tuple[Topic, ...]
    folds: tuple[Fold, ...]
    projections: tuple[Projection, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Topology:
        names = [topic.name for topic in self.topics]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"topics declared twice: {sorted(twice)}")
        for topic in self.topics:
            if unknown := set(topic.events) - set(REGISTRY):
                raise ValueError(f"{topic.name}: no such event types: {sorted(unknown)}")
        for fold in self.folds:
            self._check_role(fold)
        for projection in self.projections:
            self._check_role(projection)
        return self

    def _check_role(self, role: Fold | Projection) -> None:
        counts = set()
        for name in role.inputs:
            topic = self.topic(name)
            counts.add(self.partitions(name))
            if role.role not in topic.readers:
                raise ValueError(f"{role.role} reads {name}, which does not name it as a reader")
        if len(counts) != 1:
            raise ValueError(f"{role.role}: inputs differ in partition count, so they cannot be co-partitioned")
        tick = role.tick if isinstance(role, Fold) else None
        if tick is not None and (tick not in role.inputs or role.role not in self.topic(tick).writers):
            raise ValueError(f"{role.role}: must both read and write its tick topic {tick}")

    def topic(self, name: str) -> Topic:
        """The declared topic called ``name`` (without prefix)."""
        for topic in self.topics:
            if topic.name == name:
                return topic
        raise KeyError(f"no topic {name!r} in the topology")

    def fold(self, role: str) -> Fold:
        """The declared fold of ``role``."""
        for fold in self.folds:
            if fold.role == role:
                return fold
        raise KeyError(f"no fold {role!r} in the topology")

    def forwarder(self, name: str) -> str:
        """The fold that forwards what lies in a wrong partition of ``name``: one of its readers, or copies multiply."""
        return next(fold.role for fold in self.folds if name in fold.inputs)

    def projection(self, role: str) -> Projection:
        """The declared projection of ``role``."""
        for projection in self.projections:
            if projection.role == role:
                return projection
        raise KeyError(f"no projection {role!r} in the topology")

    def partitions(self, name: str) -> int:
        """Partition count of a declared topic."""
        declared = self.topic(name).partitions
        if declared == "tenants":
            return self.tenant_partitions
        if declared == "pools":
            return self.worker_pools
        return declared

    def fold_partitions(self, role: str) -> int:
        """How many folds of ``role`` there are: the common partition count of its inputs."""
        return self.partitions(self.fold(role).inputs[0])

    def declared(self, prefix: str) -> list[Declared]:
        """Every topic that a deployment needs on its broker, changelogs and journals included."""
        wanted = [
            _declare(prefix, t.name, self.partitions(t.name), t.cleanup, t.retention_ms, t.max_message_bytes)
            for t in self.topics
        ]
        for fold in self.folds:
            count = self.fold_partitions(fold.role)
            changelog = _declare(prefix, fold.changelog, count, "compact", _CHANGELOG_RETENTION_MS, 2**20)
            wanted.append(changelog.model_copy(update={"config": changelog.config | _CHANGELOG_CONFIG}))
            wanted.append(_declare(prefix, fold.journal, count, "delete", _JOURNAL_RETENTION_MS, 2**20))
        return wanted


def full_name(prefix: str, name: str) -> str:
    """A topic's name on the broker: the deployment's prefix, a dot, the declared name."""
    return f"{prefix}.{name}"


def _declare(prefix: str, name: str, partitions: int, cleanup: str, retention_ms: int, max_bytes: int) -> Declared:
    config = {
        "cleanup.policy": cleanup,
        "max.message.bytes": str(BROKER_LIMIT_FACTOR * max_bytes),
        "message.timestamp.type": "LogAppendTime",
    }
    if "delete" in cleanup:
        config["retention.ms"] = str(retention_ms)
    if "compact" in cleanup:
        config["max.compaction.lag.ms"] = str(_COMPACTION_LAG_MS)
        config["delete.retention.ms"] = str(TOMBSTONES_MS)
    return Declared(topic=full_name(prefix, name), partitions=partitions, config=config)


@lru_cache(maxsize=4)
def load_topology(path: Path = TOPOLOGY / "topics.yaml") -> Topology:
    """Read and validate the topology.

    Raises:
        ConfigurationError: the file is missing, is not YAML, or contradicts itself; the message names the place.
    """
    try:
        return Topology.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError, KeyError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
