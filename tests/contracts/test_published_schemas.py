"""What lies in ``schemas/`` is what the models say, and every example means what its name says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import pytest
from jsonschema import Draft202012Validator

from settler_streams.errors import ConfigurationError, RecordError
from settler_streams.events import REGISTRY, decode, encode, publication
from settler_streams.published import SCHEMAS
from tests.contracts.json_schema import validator

if TYPE_CHECKING:
    from pathlib import Path

VALID = sorted((SCHEMAS / "examples").glob("*/valid-*.json"))
INVALID = sorted((SCHEMAS / "examples").glob("*/invalid-*.json"))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_generated_schemas_equal_the_committed_ones() -> None:
    committed = {path.stem: path.read_bytes() for path in (SCHEMAS / "events").glob("*.json")}
    assert committed == publication.documents()


def test_the_lock_holds_every_schema() -> None:
    lock = json.loads((SCHEMAS / "lock.json").read_text())
    assert lock == {name: publication.digest(document) for name, document in publication.documents().items()}


@pytest.mark.parametrize("event_type", sorted(REGISTRY))
def test_each_schema_is_a_schema_and_says_what_it_is(event_type: str) -> None:
    document = publication.schema_of(event_type)
    Draft202012Validator.check_schema(document)
    assert document["$id"].endswith(event_type)
    assert document["description"]
    assert {"specversion", "type", "id", "source", "time", "tenantid", "data"} <= set(document["required"])


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    assert set(publication.publish(tmp_path)) == set(REGISTRY)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert publication.publish(tmp_path) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == first


def test_a_released_schema_never_changes(tmp_path: Path) -> None:
    publication.publish(tmp_path)
    lock_path = tmp_path / "lock.json"
    lock = json.loads(lock_path.read_text())
    lock["settler.clock.tick.v1"] = "0" * 64
    lock_path.write_text(json.dumps(lock))
    schema = tmp_path / "events" / "settler.clock.tick.v1.json"
    schema.write_text("as released")
    with pytest.raises(ConfigurationError, match=r"settler\.clock\.tick\.v1 is released and would change"):
        publication.publish(tmp_path)
    assert schema.read_text() == "as released"


def test_a_released_type_is_never_withdrawn(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text(json.dumps({"settler.job.requested.v0": "0" * 64}))
    with pytest.raises(ConfigurationError, match=r"settler\.job\.requested\.v0 is released"):
        publication.publish(tmp_path)


def test_a_new_type_is_added_to_the_lock(tmp_path: Path) -> None:
    publication.publish(tmp_path)
    lock_path = tmp_path / "lock.json"
    lock = json.loads(lock_path.read_text())
    del lock["settler.clock.tick.v1"]
    lock_path.write_text(json.dumps(lock))
    assert publication.publish(tmp_path) == ["settler.clock.tick.v1"]
    assert "settler.clock.tick.v1" in json.loads(lock_path.read_text())


def test_every_type_has_examples() -> None:
    for event_type in REGISTRY:
        folder = SCHEMAS / "examples" / event_type
        assert len(list(folder.glob("valid-*.json"))) >= 1, event_type
        assert len(list(folder.glob("invalid-*.json"))) >= 2, event_type
    assert {path.parent.name for path in (*VALID, *INVALID)} == set(REGISTRY)


@pytest.mark.parametrize("path", VALID, ids=_name)
def test_a_valid_example_is_accepted_and_comes_back_byte_for_byte(path: Path) -> None:
    content = path.read_bytes()
    event = decode(content)
    assert event.type == path.parent.name
    validator(event.type).validate(json.loads(content))
    written = encode(event)
    assert msgspec.json.format(written, indent=2) + b"\n" == content
    assert encode(decode(written)) == written


@pytest.mark.parametrize("path", INVALID, ids=_name)
def test_an_invalid_example_is_refused_by_decoder_and_schema(path: Path) -> None:
    content = path.read_bytes()
    assert not validator(path.parent.name).is_valid(json.loads(content))
    with pytest.raises(RecordError):
        decode(content)
