"""Which agents there are, and how a role's Faust app is put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from settler_streams.agents import admission
from settler_streams.core.fold import State, Value
from settler_streams.runtime.app import BatchAgent, FoldApp
from settler_streams.runtime.routing import Router
from settler_streams.runtime.session import FoldSpec, Session
from settler_streams.runtime.ticker import Ticker
from settler_streams.settings import Settings
from settler_streams.topology import Topology, full_name


@dataclass(frozen=True, slots=True)
class Role:
    """A fold role: its agent, the kinds of its state, and the logic built from that state."""

    agent: BatchAgent
    kinds: Mapping[str, type[Value]]
    new_logic: Callable[[State, int, Topology], Any]


ROLES: dict[str, Role] = {
    admission.ROLE: Role(admission.admission, admission.KINDS, admission.new_logic),
}


def fold_app(role: str, settings: Settings, topology: Topology) -> FoldApp:
    """The Faust app of ``role``, with its agent registered. Call it inside the running event loop."""
    definition = ROLES[role]
    declared = topology.fold(role)
    spec = FoldSpec(
        declared=declared,
        topology=topology,
        bootstrap_servers=settings.kafka_bootstrap_servers,
        deployment=settings.deployment,
        kinds=definition.kinds,
        new_logic=partial(_new_logic, definition, topology),
        router=Router(topology),
    )
    app = FoldApp(
        f"{settings.deployment}.{role}",
        bootstrap_servers=settings.kafka_bootstrap_servers,
        input_topics=tuple(spec.topic(name) for name in declared.inputs),
        partitions=topology.fold_partitions(role),
        new_session=partial(Session, spec),
    )
    app.batch_agent(definition.agent)
    if declared.tick is not None:
        tick_topic = full_name(settings.deployment, declared.tick)
        app.ticker = Ticker(role, tick_topic, settings.kafka_bootstrap_servers, app.open_folds)
    return app


def _new_logic(definition: Role, topology: Topology, state: State, partition: int) -> Any:
    return definition.new_logic(state, partition, topology)
