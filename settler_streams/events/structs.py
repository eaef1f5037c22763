"""One definition, two decoders: a pydantic model is written down, and a msgspec struct with the same rules is derived.

The decorators :func:`part` and :func:`event` replace a pydantic model by a frozen ``msgspec.Struct`` of the same
fields, constraints and defaults; the model stays reachable as ``Struct.model`` and is what the JSON Schemas are
generated from. Type checkers see the model (class decorators do not change a class for them), so constructing and
matching on an event is checked; at run time an event costs a struct.

A test proves on generated documents that both accept and refuse the same ones.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import msgspec
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

I64_MIN, I64_MAX = -(2**63), 2**63 - 1

NO_NUL = r"^[^\u0000]*$"
"""Published for every string. The codec enforces it once per record on the raw bytes, so structs need not."""

M = TypeVar("M", bound="Part")


class Part(BaseModel):
    """Base of event bodies and of the values nested in them. Unknown fields are ignored: additions are compatible."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    model: ClassVar[type[BaseModel]]
    event_type: ClassVar[str]
    late: ClassVar[tuple[tuple[str, str], ...]]
    """Fields whose pattern the struct leaves to whoever decodes it, and the pattern."""


def part(cls: type[M]) -> type[M]:
    """Replace a nested value's model by its struct."""
    return _derive(cls, late=False)


def event(event_type: str) -> Callable[[type[M]], type[M]]:
    """Replace an event body's model by its struct and register it under ``event_type`` (which ends in its version)."""

    def decorate(cls: type[M]) -> type[M]:
        struct = _derive(cls, late=True)
        struct.event_type = event_type
        if REGISTRY.setdefault(event_type, struct) is not struct:
            raise TypeError(f"event type declared twice: {event_type}")
        return struct

    return decorate


REGISTRY: dict[str, type[Part]] = {}
"""Every event type of the system and its struct."""


_ALTERNATIVES = re.compile(r"\^\(([a-z0-9_-]+(?:\|[a-z0-9_-]+)+)\)\$")


def _derive(model: type[M], *, late: bool) -> type[M]:
    tag: dict[str, str] = {}
    patterns: list[tuple[str, str]] = []
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    hints = typing.get_type_hints(model, include_extras=True)
    for name, info in model.model_fields.items():
        hint = hints[name]
        if get_origin(hint) is Literal and len(get_args(hint)) == 1:
            tag = {"tag_field": name, "tag": get_args(hint)[0]}
            continue
        if late and (pattern := plain_pattern(hint)) is not None:
            patterns.append((name, pattern))
            hint = str if get_origin(hint) is Annotated else str | None
        if info.default is PydanticUndefined:
            fields.append((name, _annotation(hint)))
        else:
            fields.append((name, _annotation(hint), info.default))
    struct = msgspec.defstruct(
        model.__name__,
        fields,
        module=model.__module__,
        frozen=True,
        kw_only=True,
        omit_defaults=True,
        gc=False,  # what JSON can say has no cycles, and collecting them would cost a third of the decoding
        namespace={
            "__doc__": model.__doc__,
            "model": model,
            "event_type": "",
            "late": tuple(patterns),
            "__get_pydantic_core_schema__": classmethod(lambda _cls, _source, handler: handler(model)),
        },
        **tag,  # type: ignore[arg-type]
    )
    return typing.cast("type[M]", struct)


def _annotation(hint: Any) -> Any:
    """Translate a pydantic annotation into msgspec's, constraint by constraint; integers are bounded to 64 bits."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *metadata = get_args(hint)
        rules: dict[str, Any] = {"ge": I64_MIN, "le": I64_MAX} if inner is int else {}
        for item in metadata:
            _collect(item, rules)
        if "oneof" in rules:
            return Literal[rules["oneof"]]
        if "gt" in rules:
            rules.pop("ge", None)
        if "lt" in rules:
            rules.pop("le", None)
        return Annotated[_annotation_inner(inner), msgspec.Meta(**rules)] if rules else _annotation_inner(inner)
    if hint is int:
        return Annotated[int, msgspec.Meta(ge=I64_MIN, le=I64_MAX)]
    return _annotation_inner(hint)


def _annotation_inner(hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return Union[tuple(_annotation(arg) for arg in args)]  # noqa: UP007 - built at run time
    if origin in (tuple, dict, list):
        return origin[tuple(arg if arg is Ellipsis else _annotation(arg) for arg in args)]
    return hint


def _collect(item: Any, rules: dict[str, Any]) -> None:
    if isinstance(item, FieldInfo):
        for nested in item.metadata:
            _collect(nested, rules)
        return
    match item:
        case annotated_types.Ge(ge=value):
            rules["ge"] = value
        case annotated_types.Le(le=value):
            rules["le"] = value
        case annotated_types.Gt(gt=value):
            rules["gt"] = value
        case annotated_types.Lt(lt=value):
            rules["lt"] = value
        case annotated_types.MinLen(min_length=value):
            rules["min_length"] = value
        case annotated_types.MaxLen(max_length=value):
            rules["max_length"] = value
        case annotated_types.Timezone():
            rules["tz"] = True
        case _:
            _collect_pattern(item, rules)


def _collect_pattern(item: Any, rules: dict[str, Any]) -> None:
    pattern = getattr(item, "pattern", None)
    if pattern is None:
        raise TypeError(f"no msgspec rule for the constraint {item!r}")
    if alternatives := _ALTERNATIVES.fullmatch(pattern):
        rules["oneof"] = tuple(alternatives[1].split("|"))  # a look-up instead of a call of the pattern
    elif pattern != NO_NUL:
        rules["pattern"] = _in_python(pattern)


def plain_pattern(hint: Any) -> str | None:
    """The pattern of a string, or of a string or null, that has no other constraint; None for any other hint."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType) and len(args) == 2 and args[1] is type(None):
        hint, origin, args = args[0], get_origin(args[0]), get_args(args[0])
    if origin is not Annotated or args[0] is not str:
        return None
    rules: dict[str, Any] = {}
    for item in args[1:]:
        _collect(item, rules)
    return rules["pattern"] if rules.keys() == {"pattern"} else None


def _in_python(pattern: str) -> str:
    """In Python's dialect `$` also matches before a final line feed; in JSON Schema's and pydantic's not."""
    return pattern.removesuffix("$") + r"\Z" if pattern.endswith("$") else pattern
