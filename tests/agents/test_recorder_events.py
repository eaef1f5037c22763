"""The recorder knows every event that its topics may hold: what it has no use for would be a dead letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from settler_streams.agents.recorder import ROLE, effects_of
from settler_streams.core.fold import Record
from settler_streams.events import decode
from settler_streams.topology import load_topology

EXAMPLES = Path(__file__).parents[2] / "schemas" / "examples"
TOPOLOGY = load_topology()
INPUTS = next(fold.inputs for fold in TOPOLOGY.projections if fold.role == ROLE)
CASES = [
    pytest.param(topic.name, example, id=f"{topic.name} {example.parent.name} {example.stem}")
    for topic in TOPOLOGY.topics
    if topic.name in INPUTS
    for event_type in topic.events
    for example in sorted((EXAMPLES / event_type).glob("valid-*.json"))
]


@pytest.mark.parametrize(("topic", "example"), CASES)
def test_every_event_of_its_topics_is_known(topic: str, example: Path) -> None:
    event = decode(example.read_bytes())
    effects = effects_of(Record(topic, 0, 0, str(event.tenantid), event))
    assert {effect.tenant_id for effect in effects} <= {event.tenantid}


def test_every_type_has_an_example() -> None:
    assert {topic for topic, _ in (case.values for case in CASES)} == set(INPUTS)
