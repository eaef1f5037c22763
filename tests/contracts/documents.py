"""Hypothesis strategies: documents that a published schema allows, and documents with one thing wrong."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from settler_streams.events.publication import schema_of

Json = Any

EDGES: list[Json] = [
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, 0.5, 1e300, "",
    "0", "1", "true", "null", "\u0000", "a\u0000b", "a\n", "\n", "é", "😀", "x" * 1001, "x" * 10_001, "NaN",
    "00000000-0000-0000-0000-000000000000", "00000000-0000-0000-0000-00000000000A",
    "00000000-0000-0000-0000-000000000000\n", [], [None], [[]], {}, {"a": None}, {"\u0000": 1}, "one_to_one\n", "csv\n",
]  # fmt: skip
"""Values at the borders of what a field takes: 64 bits, Unicode, empty, other types."""


def valid(event_type: str) -> st.SearchStrategy[Json]:
    """Whole events, envelope included, that the schema of ``event_type`` allows."""
    document = schema_of(event_type)
    return _of(document, document.get("$defs", {}))


@st.composite
def mutated(draw: st.DrawFn, event_type: str) -> Json:
    """An allowed event with one value replaced, taken away, or put in."""
    document = copy.deepcopy(draw(valid(event_type)))
    container, key = draw(st.sampled_from(list(_places(document["data"], document, "data"))))
    match draw(st.sampled_from(("replace", "remove", "add"))):
        case "replace":
            container[key] = draw(st.sampled_from(EDGES))
        case "remove":
            del container[key]
        case "add" if isinstance(container, dict):
            container["unheard_of"] = draw(st.sampled_from([edge for edge in EDGES if "u0000" not in repr(edge)]))
        case _:
            container.append(draw(st.sampled_from(EDGES)))
    return document


def _places(value: Json, container: Json, key: Any) -> list[tuple[Json, Any]]:
    found = [(container, key)]
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        found += _places(member, value, name)
    return found


def _of(schema: dict[str, Json], definitions: dict[str, Json]) -> st.SearchStrategy[Json]:
    if "$ref" in schema:
        return _of(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([_of(member, definitions) for member in schema[union]])
    match schema["type"]:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema.get("minimum"), schema.get("maximum"))
        case "string":
            return _text(schema)
        case "array":
            least, most = schema.get("minItems", 0), schema.get("maxItems", 4)
            return st.lists(_of(schema["items"], definitions), min_size=least, max_size=max(least, min(4, most)))
        case "object":
            return _object(schema, definitions)
    raise AssertionError(f"no strategy for {schema}")


def _object(schema: dict[str, Json], definitions: dict[str, Json]) -> st.SearchStrategy[Json]:
    if "properties" not in schema:
        names = schema.get("propertyNames", {})
        keys = _of(names if "$ref" in names else {"type": "string", **names}, definitions)
        return st.dictionaries(keys, _of(schema["additionalProperties"], definitions), max_size=3)
    fields = {name: _of(field, definitions) for name, field in schema["properties"].items()}
    required = {name: fields.pop(name) for name in schema.get("required", ())}
    return st.fixed_dictionaries(required, optional=fields)


def _text(schema: dict[str, Json]) -> st.SearchStrategy[str]:
    if schema.get("format") == "date-time":
        return st.datetimes().map(lambda moment: moment.isoformat() + "Z")
    pattern = schema.get("pattern")
    if pattern is None or "u0000" in pattern:
        alphabet = st.characters(exclude_categories=("Cs",), exclude_characters="\u0000")
        size = min(schema.get("maxLength", 30), 30)
        return st.text(alphabet, min_size=schema.get("minLength", 0), max_size=size)
    return st.from_regex(pattern.replace("$", r"\Z"), fullmatch=True)
