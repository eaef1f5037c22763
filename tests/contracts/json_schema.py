"""A JSON Schema validator whose ``pattern`` follows the specification: ``$`` is the end of the text, nothing else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jsonschema
from jsonschema import Draft202012Validator

from settler_streams.events.publication import schema_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def _pattern(_validator: Any, pattern: str, instance: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(instance, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(Draft202012Validator, {"pattern": _pattern})


def validator(event_type: str) -> Any:
    return _Validator(schema_of(event_type), format_checker=Draft202012Validator.FORMAT_CHECKER)
