"""The published contract: one JSON Schema (2020-12) per event type, generated from the models and locked once released.

``python -m settler_streams.events.publication`` writes ``schemas/events/<type>.json`` and adds new types to
``schemas/lock.json``. A locked schema never changes: whoever needs another shape publishes a new type beside it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from settler_streams.errors import ConfigurationError, SettlerError
from settler_streams.events.envelope import SOURCE_LENGTH_MAX, SUBJECT_LENGTH_MAX
from settler_streams.events.fields import Uuid
from settler_streams.events.structs import NO_NUL, REGISTRY, Part
from settler_streams.published import SCHEMAS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TIME_PATTERN = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt ]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
    r"(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):?[0-5][0-9])$"
)
"""RFC 3339, as far as a pattern can say it: that February has no 30th day is left to ``format``."""

Schema = dict[str, Any]


def schema_of(event_type: str) -> Schema:
    """The JSON Schema of one event type: the CloudEvents attributes with the body under ``data``.

    Raises:
        KeyError: no such event type.
    """
    body = _body_schema(REGISTRY[event_type])
    definitions = body.pop("$defs", {})
    document: Schema = {
        "$schema": DIALECT,
        "$id": f"urn:settler:schema:{event_type}",
        "title": event_type,
        "description": body.get("description", ""),
        "type": "object",
        "required": ["specversion", "type", "id", "source", "time", "tenantid", "data"],
        "properties": {**_attributes(event_type), "data": body},
    }
    if definitions:
        document["$defs"] = definitions
    return document


def documents() -> dict[str, bytes]:
    """Every event type's schema as the bytes that are published."""
    return {event_type: _rendered(schema_of(event_type)) for event_type in sorted(REGISTRY)}


def digest(document: bytes) -> str:
    """What the lock holds of a schema: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(document).hexdigest()


def publish(directory: Path = SCHEMAS) -> list[str]:
    """Write the schemas and lock the new ones; returns the types that were not published before.

    Raises:
        ConfigurationError: a released type is gone, or its schema would change. Nothing is written then.
    """
    lock_path = directory / "lock.json"
    lock: dict[str, str] = json.loads(lock_path.read_text()) if lock_path.exists() else {}
    generated = documents()
    if problems := list(_breaches(lock, generated)):
        raise ConfigurationError("; ".join(problems))
    (directory / "events").mkdir(parents=True, exist_ok=True)
    for event_type, document in generated.items():
        (directory / "events" / f"{event_type}.json").write_bytes(document)
    lock_path.write_bytes(_rendered({name: digest(document) for name, document in generated.items()}))
    return sorted(generated.keys() - lock.keys())


def _breaches(lock: Mapping[str, str], generated: Mapping[str, bytes]) -> Iterator[str]:
    for event_type, released in lock.items():
        if event_type not in generated:
            yield f"{event_type} is released and must stay readable; bring its model back"
        elif digest(generated[event_type]) != released:
            yield (
                f"the schema of {event_type} is released and would change; publish a new type beside it "
                "(only what was never released may be taken out of schemas/lock.json)"
            )


def _attributes(event_type: str) -> Schema:
    uuid = TypeAdapter(Uuid).json_schema()
    return {
        "specversion": {"const": "1.0"},
        "type": {"const": event_type},
        "id": {**uuid, "description": "Unique per source. The same (source, id) again is the same event."},
        "source": {
            "type": "string",
            "format": "uri-reference",
            "minLength": 1,
            "maxLength": SOURCE_LENGTH_MAX,
            "pattern": NO_NUL,
            "description": "Who published the event.",
        },
        "subject": {
            "anyOf": [
                {"type": "string", "minLength": 1, "maxLength": SUBJECT_LENGTH_MAX, "pattern": NO_NUL},
                {"type": "null"},
            ],
            "description": "What the event is about, such as a job.",
        },
        "time": {
            "type": "string",
            "format": "date-time",
            "pattern": TIME_PATTERN,
            "description": "When it happened, by its publisher's clock; with an offset.",
        },
        "tenantid": {**uuid, "description": "The tenant concerned; the nil UUID stands for the platform."},
        "datacontenttype": {"const": "application/json"},
    }


def _body_schema(body: type[Part]) -> Schema:
    schema: Schema = body.model.model_json_schema(mode="validation")
    for definition in (schema, *schema.get("$defs", {}).values()):
        _require_tags(definition)
        for field in definition.get("properties", {}).values():
            _bind_keys(field)
    return schema


def _require_tags(definition: Schema) -> None:
    """A constant tells the members of a union apart, so it is required, although a model gives it a default."""
    for name, field in definition.get("properties", {}).items():
        if "const" in field:
            field.pop("default", None)
            definition["required"] = sorted({*definition.get("required", ()), name})


def _bind_keys(schema: Schema) -> None:
    """A mapping's key pattern refuses other keys; as ``patternProperties`` it would only leave them unchecked."""
    for nested in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(nested, dict):
            _bind_keys(nested)
    if patterns := schema.pop("patternProperties", None):
        ((pattern, value),) = patterns.items()
        schema["propertyNames"] = {**schema.get("propertyNames", {}), "pattern": pattern}
        schema["additionalProperties"] = value


def _rendered(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False, sort_keys=False).encode() + b"\n"


def main() -> int:
    """Publish; 0: done, 1: refused, with the reason on standard error."""
    try:
        new = publish()
    except SettlerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{len(REGISTRY)} event types published, new: {', '.join(new) or 'none'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
