"""Keys set, removed and renamed without quantizing again, and what undoes it.

    {"op": "set", "key": K, "type": "uint32", "value": 15}
    {"op": "unset", "key": K}
    {"op": "rename", "key": K, "to": L}
    {"op": "restore", "key": K, "index": 12, "packed": BASE64}     what an undo has: the bytes as they were

An array's type is written `string[]`, its value as a list. Undoing gives the very same bytes.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf3n.errors import OutputError, UsageError, shown
from gguf3n.formats.gguf_draft import Draft
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, Scalar
from gguf3n.formats.gguf_reader import GGUFArray, GGUFKey, open_part
from gguf3n.formats.gguf_writer import pack_string
from gguf3n.formats.whole_file import check_output, write_whole

TYPES: Mapping[str, GGUFValueType] = {
    kind.name.lower(): kind for kind in GGUFValueType if kind is not GGUFValueType.ARRAY
}
INTEGERS = frozenset(name for name in TYPES if "int" in name)

Operation = Mapping[str, Any]


@dataclass(frozen=True)
class Edit:
    """What `edit` did or would do. `undo` are the operations that give the old bytes back, in order."""

    path: Path
    changes: tuple[str, ...]
    how: str
    undo: tuple[dict[str, Any], ...]


def edit(
    path: str | Path,
    operations: Iterable[Operation],
    *,
    output: str | Path | None = None,
    undo_file: str | Path | None = None,
    dry_run: bool = False,
) -> Edit:
    """Change a file's keys, one operation after another.

    Args:
        output: write another file; the default is the file itself, see `Draft.save`.
        undo_file: a new file for `undo`, as JSON. It is there before a byte is changed.

    Raises: UsageError for an operation that can't be carried out; GGUFError; OutputError. Nothing is written then.
    """
    path, output = Path(path), None if output is None else Path(output)
    undo_file = None if undo_file is None else Path(undo_file)
    if undo_file is not None:
        _check_undo_file(undo_file, output)
    draft = Draft(open_part(path))
    changes: list[str] = []
    undo: list[dict[str, Any]] = []
    for operation in operations:
        change, reverse = _apply(draft, operation)
        changes.append(change)
        undo.insert(0, reverse)
    draft.preview(strict=True)  # raises where the file could not be read again
    if dry_run:
        how = "unchanged" if not draft.changed else "copied" if draft.patches() is None else "in place"
    else:
        with _kept(undo, undo_file, draft):
            how = draft.save(output)
    return Edit(path, tuple(changes), how, tuple(undo))


def _check_undo_file(undo_file: Path, output: Path | None) -> None:
    """Raises: OutputError."""
    if output is not None and os.path.abspath(undo_file) == os.path.abspath(output):
        raise OutputError(f"{undo_file}: the output and what undoes it", fix="choose another name for one of them")
    if os.path.lexists(undo_file):  # check_output would advise --force
        raise OutputError(f"{undo_file} exists already", fix="choose another name for --undo-file")
    check_output(undo_file, force=False)


@contextmanager
def _kept(undo: list[dict[str, Any]], undo_file: Path | None, draft: Draft) -> Iterator[None]:
    """Write what undoes a draft before it is saved; remove it where nothing of the draft was. Raises: OutputError."""
    if undo_file is None:
        yield
        return
    write_whole(undo_file, json.dumps(undo, indent=1), force=False)
    try:
        yield
    except BaseException:
        if not draft.partly_saved:
            undo_file.unlink(missing_ok=True)
        raise


def _apply(draft: Draft, operation: Operation) -> tuple[str, dict[str, Any]]:
    """Carry out one operation on the draft; what it did, and its reverse."""
    if not isinstance(operation, Mapping):
        raise UsageError(
            "not an operation", expected='as in {"op": "unset", "key": "general.name"}', found=shown(operation)
        )
    name, names = _field(operation, "key", str), draft.names()
    op = operation.get("op")
    if op not in ("set", "unset", "rename", "restore"):
        raise UsageError("unknown operation", expected="set, unset, rename or restore", found=str(op))
    if op in ("unset", "rename") and name not in names:
        raise UsageError(f"{draft.gguf.name}: no key {name!r}", fix="see them with gguf3n inspect --keys")
    index = names.index(name) if name in names else None
    before = None if index is None else _packed(name, index, draft.packed[index][1])
    if op == "unset":
        draft.unset(name)
        return f"unset {name}", before or {}
    if op == "rename":
        new = _field(operation, "to", str)
        if new in names or not new:
            raise UsageError(f"can't rename {name} to {new!r}", found="a key of that name" if new else "no name")
        draft.rename(name, new)
        return f"rename {name} to {new}", {"op": "rename", "key": new, "to": name}
    if op == "restore":
        try:
            packed = base64.b64decode(_field(operation, "packed", str), validate=True)
        except ValueError as error:
            raise UsageError(f"restore {name}: not base64", found=str(error)) from error
        place = _field(operation, "index", int)
        if not packed.startswith(pack_string(name)) or not 0 <= place <= len(names):
            raise UsageError(
                f"restore {name}: not what an undo has", expected="that key's bytes, and a place among the keys"
            )
        draft.put(name, packed, place)
        return f"restore {name}", before or {"op": "unset", "key": name}
    key = make_key(name, _field(operation, "type", str), operation.get("value"))
    draft.set(key)
    return f"set {name} to {_shown(key)}", before or {"op": "unset", "key": name}


def _packed(name: str, index: int, packed: bytes) -> dict[str, Any]:
    return {"op": "restore", "key": name, "index": index, "packed": base64.b64encode(packed).decode()}


def _field(operation: Operation, name: str, kind: type) -> Any:
    value = operation.get(name)
    if type(value) is not kind or (value == "" and name == "key"):
        raise UsageError(f"an operation without {name!r}", expected=kind.__name__, found=shown(dict(operation)))
    if isinstance(value, str):
        _check_encodable(value, name)
    return value


def _check_encodable(text: str, what: str) -> None:
    """Why: half of a surrogate pair, or a command line's bytes that are no text, would be written as "?"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what}: not a text", expected="UTF-8", found=shown(text)) from error


def _shown(key: KeyValue) -> str:
    if isinstance(key.value, list):
        return f"an array of {len(key.value):,} {TYPE_NAMES[key.element_type or key.type]}"
    text = repr(key.value)
    return f"{text if len(text) <= 60 else text[:59] + '…'}, {TYPE_NAMES[key.type]}"


TYPE_NAMES = {kind: name for name, kind in TYPES.items()}


def type_of(key: GGUFKey) -> str:
    """A key's type as operations write it."""
    if isinstance(key.value, GGUFArray):
        return TYPE_NAMES[key.value.element_type] + "[]"
    return TYPE_NAMES[key.type]


def guessed_type(value: Any) -> str:
    """The type that a new key gets where none is said: of JSON's kinds, those that GGUF files usually have."""
    if isinstance(value, list):
        return (guessed_type(value[0]) if value else "string") + "[]"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "uint32" if 0 <= value < 2**32 else "int64"
    return "float32" if isinstance(value, float) else "string"


def parse_value(text: str, kind: str | None) -> Any:
    """A value from the command line: text as it is for strings, else JSON; without a type, JSON where it is that."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if kind is None:
            return text
        raise UsageError(f"not a {kind}", found=text[:80], expected="JSON: 15, 1.5, true, [1, 2]") from None


def make_key(name: str, kind: str, value: Any) -> KeyValue:
    """A key of a type by its name. Raises: UsageError for an unknown type or a value that it can't hold."""
    bare = kind.removesuffix("[]")
    if bare not in TYPES:
        raise UsageError(f"{name}: unknown type {kind!r}", expected=", ".join(TYPES) + ", or one with []")
    if not kind.endswith("[]"):
        return KeyValue(name, TYPES[bare], _scalar(name, bare, value))
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UsageError(f"{name}: not a list", expected=kind, found=shown(value))
    return KeyValue(name, GGUFValueType.ARRAY, [_scalar(name, bare, item) for item in value], TYPES[bare])


def _scalar(name: str, kind: str, value: Any) -> Scalar:
    right: bool
    if kind == "string":
        right = isinstance(value, str)
    elif kind == "bool":
        right = isinstance(value, bool)
    elif kind in INTEGERS:
        bits = np.iinfo(kind)
        right = type(value) is int and int(bits.min) <= value <= int(bits.max)
    else:
        is_finite = type(value) is int or (type(value) is float and math.isfinite(value))
        right = abs(value) <= float(np.finfo(kind).max) if is_finite else type(value) is float
        value = float(value) if right else value
    if not right:
        raise UsageError(f"{name}: not a {kind}", found=shown(value))
    if isinstance(value, str):
        _check_encodable(value, name)
    result: Scalar = value
    return result
