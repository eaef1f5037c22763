"""Which agents there are, and how a role's Faust app is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from settler_streams.adapters.kafka.cluster import Cluster
from settler_streams.adapters.postgres.pool import TenantConnectionPool
from settler_streams.agents import admission, dead_letters, flags, noisy_neighbour, recorder, scheduler, webhooks
from settler_streams.core.fold import State, Value
from settler_streams.runtime.app import BatchAgent, FoldApp
from settler_streams.runtime.projection import ProjectionSession, ProjectionSpec
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.ticker import Ticker
from settler_streams.settings import Settings
from settler_streams.topology import Fold, Projection, Topology, full_name


@dataclass(frozen=True, slots=True)
class Role:
    """A fold role: its agent, the kinds of its state, and the logic built from that state."""

    agent: BatchAgent
    kinds: Mapping[str, type[Value]]
    new_logic: Callable[[State, int, Topology], Any]


FOLDS: dict[str, Role] = {
    admission.ROLE: Role(admission.admission, admission.KINDS, admission.new_logic),
    scheduler.ROLE: Role(scheduler.scheduler, scheduler.KINDS, scheduler.new_logic),
    flags.ROLE: Role(flags.flags, flags.KINDS, flags.new_logic),
    noisy_neighbour.ROLE: Role(noisy_neighbour.noisy_neighbour, noisy_neighbour.KINDS, noisy_neighbour.new_logic),
    noisy_neighbour.DETECTOR_ROLE: Role(
        noisy_neighbour.noisy_neighbour, noisy_neighbour.DETECTOR_KINDS, noisy_neighbour.new_detector
    ),
}
PROJECTIONS: dict[str, BatchAgent] = {
    recorder.ROLE: recorder.recorder,
    webhooks.ROLE: webhooks.webhooks,
    dead_letters.ROLE: dead_letters.dead_letters,
}
ROLES = (*FOLDS, *PROJECTIONS)
"""Every role that a worker can run."""


def new_app(role: str, settings: Settings, topology: Topology, pool: TenantConnectionPool | None) -> FoldApp:
    """The Faust app of ``role``, with its agent registered. Call it inside the running event loop.

    ``pool`` is needed by projections only.
    """
    if role in FOLDS:
        return fold_app(role, settings, topology)
    if pool is None:
        raise ValueError(f"{role} writes to Postgres and needs a pool")
    return projection_app(role, settings, topology, pool)


def fold_app(role: str, settings: Settings, topology: Topology) -> FoldApp:
    """The app of a role whose state lies in Kafka."""
    definition = FOLDS[role]
    declared = topology.fold(role)
    spec = FoldSpec(
        declared=declared,
        topology=topology,
        cluster=Cluster.of(settings),
        deployment=settings.deployment,
        kinds=definition.kinds,
        new_logic=partial(_new_logic, definition, topology),
        router=Router(topology),
    )
    app = _app(declared, settings, topology, partial(Session, spec), (declared.changelog, declared.journal))
    app.fold_table(spec.topic(declared.changelog), definition.kinds)
    app.batch_agent(definition.agent)
    if declared.tick is not None:
        tick_topic = full_name(settings.deployment, declared.tick)
        app.ticker = Ticker(role, tick_topic, Cluster.of(settings), app.clocks)
    return app


def projection_app(role: str, settings: Settings, topology: Topology, pool: TenantConnectionPool) -> FoldApp:
    """The app of a role that writes to Postgres together with its position there."""
    declared = topology.projection(role)
    spec = ProjectionSpec(declared, topology, Cluster.of(settings), settings.deployment, pool)
    app = _app(declared, settings, topology, partial(ProjectionSession, spec))
    app.batch_agent(PROJECTIONS[role])
    return app


def _app(
    declared: Fold | Projection,
    settings: Settings,
    topology: Topology,
    new_session: Callable[[int], Any],
    own_topics: tuple[str, ...] = (),
) -> FoldApp:
    role, inputs = declared.role, declared.inputs
    partitions = topology.partitions(inputs[0])
    outputs = {topic.name: topology.partitions(topic.name) for topic in topology.topics if role in topic.writers}
    outputs |= dict.fromkeys(own_topics, partitions)
    return FoldApp(
        role,
        f"{settings.deployment}.{role}",
        cluster=Cluster.of(settings),
        input_topics=tuple(full_name(settings.deployment, name) for name in inputs),
        partitions=partitions,
        new_session=new_session,
        output_topics={full_name(settings.deployment, name): count for name, count in outputs.items()},
        gather_s=declared.gather_ms / 1000,
    )


def _new_logic(definition: Role, topology: Topology, state: State, partition: int) -> Any:
    return definition.new_logic(state, partition, topology)
