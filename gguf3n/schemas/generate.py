"""JSON Schemas from dataclasses, of draft 2020-12.

dataclass                 an object; a field with a default need not be there, and others may be added
str int bool None         themselves
float                     a number, or "inf", "-inf" or "nan": JSON has none of them
A | B, Literal            any of them
Enum                      its values; a ggml type or a file type its name
Sequence, tuple, list     an array, of a fixed length where a tuple has one
Mapping[str, X]           an object of any keys
Any                       anything
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SIMPLE: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]},
    Any: {},
}


def schema_of(name: str, output: Any) -> dict[str, Any]:
    """The schema of one output.

    Args:
        name: as in "gguf3n.lint/1".
        output: a dataclass, or several of which it is one.
    """
    definitions: dict[str, Any] = {}
    body = _schema(output, definitions)
    return {
        "$schema": DRAFT,
        "$id": file_name(name),
        "title": name,
        **body,
        "$defs": {key: definitions[key] for key in sorted(definitions)},
    }


def file_name(name: str) -> str:
    """As in "gguf3n.lint.1.json"."""
    return name.replace("/", ".") + ".json"


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if kind in SIMPLE:
        return dict(SIMPLE[kind])
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, definitions) for each in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple and arguments[-1] is not Ellipsis:
        n = len(arguments)
        items = [_schema(each, definitions) for each in arguments]
        return {"type": "array", "prefixItems": items, "minItems": n, "maxItems": n}
    if origin is tuple or (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if inspect.isclass(kind) and issubclass(kind, enum.IntEnum):
        return {"type": "string"}
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return {"enum": [each.value for each in kind]}
    assert is_dataclass(kind) and inspect.isclass(kind), kind
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # before its fields, of which one may be of its own kind
        definitions[kind.__name__] = _object(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    named = {field.name: field.name.rstrip("_") for field in fields(kind)}  # "for" is a word of Python's
    return {
        "type": "object",
        "description": (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " "),
        "properties": {json: _schema(hints[name], definitions) for name, json in named.items()},
        "required": [
            named[field.name] for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
        ],
    }
