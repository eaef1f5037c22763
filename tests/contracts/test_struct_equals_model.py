"""Three readers of an event say the same: the pydantic model, the msgspec struct, and the published JSON Schema.

They differ in three known ways, each on the safe side or outside of JSON Schema's reach:

* U+0000 anywhere in a record is refused by the decoder, on the raw bytes. A model does not look into fields that it
  does not know, and neither does a schema.
* ``1.0`` is an integer to JSON Schema (the specification says so), and to nobody else here.
* What is not JSON (NaN, a lone surrogate) never reaches a schema; the decoder refuses it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from settler_streams.errors import RecordError
from settler_streams.events import REGISTRY, decode
from settler_streams.published import SCHEMAS
from tests.contracts import documents
from tests.contracts.json_schema import validator

BOUNDED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TYPES = sorted(REGISTRY)
EXAMPLES = SCHEMAS / "examples"


def struct_accepts(document: Any) -> bool:
    try:
        decode(json.dumps(document).encode())
    except RecordError:
        return False
    return True


def model_accepts(document: Any) -> bool:
    try:
        REGISTRY[document["type"]].model.model_validate_json(json.dumps(document["data"]))
    except (ValidationError, KeyError):
        return False
    return True


def has_nul(document: Any) -> bool:
    """Whether a name or a text in it holds U+0000; the letters of its escape are none."""
    if isinstance(document, dict):
        return any(has_nul(part) for item in document.items() for part in item)
    if isinstance(document, list):
        return any(map(has_nul, document))
    return isinstance(document, str) and "\0" in document


@pytest.mark.parametrize("event_type", TYPES)
def test_what_a_schema_allows_all_three_accept(event_type: str) -> None:
    schema = validator(event_type)

    @BOUNDED
    @given(documents.valid(event_type))
    def check(document: Any) -> None:
        assert schema.is_valid(document)
        assert model_accepts(document)
        assert struct_accepts(document)

    check()


@pytest.mark.parametrize("event_type", TYPES)
def test_one_thing_wrong_is_judged_alike_by_all_three(event_type: str) -> None:
    schema = validator(event_type)

    @BOUNDED
    @given(documents.mutated(event_type))
    def check(document: Any) -> None:
        accepted = struct_accepts(document)
        assert accepted == (model_accepts(document) and not has_nul(document))
        assert accepted == (schema.is_valid(document) and not has_nul(document))

    check()


@pytest.mark.parametrize("event_type", TYPES)
@given(where=st.sampled_from(("specversion", "id", "source", "time", "tenantid", "datacontenttype", "subject")),
       value=st.sampled_from(documents.EDGES))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_the_attributes_of_the_envelope_are_judged_alike(event_type: str, where: str, value: Any) -> None:
    example = min((EXAMPLES / event_type).glob("valid-*.json"))
    document = json.loads(example.read_bytes())
    document[where] = value
    assert struct_accepts(document) == validator(event_type).is_valid(document)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", '"\\ud800"', '"\x01"', "01", "'a'"])
def test_what_is_not_json_is_refused(text: str) -> None:
    raw = (EXAMPLES / "settler.usage.recorded.v1" / "valid-file-stored.json").read_text()
    for field in ("quantity", "unheard_of"):
        fields = f'"resource": "requests", "quantity": 1, "{field}": {text}'
        record = raw[: raw.index('"data"')] + f'"data": {{{fields}}}, "specversion": "1.0"}}'
        with pytest.raises(RecordError):
            decode(record.encode())


def test_an_integer_written_with_a_fraction_is_refused_although_json_schema_takes_it() -> None:
    document = json.loads((EXAMPLES / "settler.usage.recorded.v1" / "valid-file-stored.json").read_bytes())
    document["data"]["quantity"] = 1.0
    assert validator("settler.usage.recorded.v1").is_valid(document)
    assert not model_accepts(document)
    assert not struct_accepts(document)
