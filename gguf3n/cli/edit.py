"""`gguf3n edit`: keys set, removed, renamed, without quantizing again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from gguf.constants import Keys

from gguf3n.cli import options
from gguf3n.cli.console import print_json
from gguf3n.cli.paint import cut, line_width, paint, say
from gguf3n.cli.repair import HOW, WOULD
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import open_part
from gguf3n.formats.small_file import MAX_OPERATIONS_BYTES, MAX_VALUE_BYTES, parse_json, read_small, read_text
from gguf3n.inspection.edit import Edit, guessed_type, parse_value, type_of
from gguf3n.inspection.edit import edit as run_edit

SCHEMA = "gguf3n.edit/1"
SET_HELP = (
    "Give a key a value. The type is the key's own; for a new one say it, as in general.x:uint32=1 or x:string[]=[…]."
)


def edit(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY[:TYPE]=VALUE", help=SET_HELP)] = None,
    set_file: Annotated[
        list[str] | None, typer.Option(metavar="KEY[:TYPE]=FILE", help="As --set, the value from a file.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(metavar="FILE", help="The chat template from a file.")] = None,
    unset: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Remove a key.")] = None,
    rename: Annotated[list[str] | None, typer.Option(metavar="KEY=NEW", help="Give a key another name.")] = None,
    apply: Annotated[Path | None, typer.Option(metavar="FILE", help="Operations in JSON, as an undo file has.")] = None,
    undo_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write what --apply needs to give the old bytes back.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write another file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes and write nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Change keys without touching tensors: first --apply, then --unset, --rename, --set. Undoing gives equal bytes."""
    operations = _read_operations(apply) if apply is not None else []
    operations += [{"op": "unset", "key": name} for name in unset or ()]
    operations += [dict(zip(("key", "to"), _split(text), strict=True), op="rename") for text in rename or ()]
    types = {key.name: type_of(key) for key in open_part(file).all_keys}
    for operation in operations:
        if operation.get("op") == "rename":
            types[str(operation.get("to"))] = types.get(str(operation.get("key")), "")
    for text in set_ or ():
        operations.append(_set(*_split(text), types))
    for text in set_file or ():
        name, path = _split(text)
        operations.append(_set(name, _read(Path(path)), types))
    if chat_template is not None:
        operations.append(_set(f"{Keys.Tokenizer.CHAT_TEMPLATE}:string", _read(chat_template), types))
    if not operations:
        raise UsageError("nothing to change", fix="give --set, --unset, --rename, --chat-template or --apply")
    result = run_edit(file, operations, output=output, undo_file=undo_file, dry_run=dry_run)
    if json:
        print_json(_as_json(result, dry_run=dry_run))
        return
    say(paint(str(file), "bold"))
    for change in result.changes:
        say(cut(f"  {change}", line_width()))
    say((WOULD if dry_run else HOW)[result.how])


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError("not KEY=VALUE", found=text[:80])
    return name, value


def _set(name: str, text: str, types: dict[str, str]) -> dict[str, Any]:
    """An operation from a key, with or without its type, and the text of its value."""
    name, _, kind = name.partition(":")
    known = kind or types.get(name)
    value = parse_value(text, known)
    return {"op": "set", "key": name, "type": known or guessed_type(value), "value": value}


def _read(path: Path) -> str:
    return read_text(path, MAX_VALUE_BYTES, UsageError)


def _read_operations(path: Path) -> list[dict[str, Any]]:
    operations = parse_json(read_small(path, MAX_OPERATIONS_BYTES, UsageError), str(path), UsageError)
    if not isinstance(operations, list) or not all(isinstance(operation, dict) for operation in operations):
        raise UsageError(f"{path}: not a list of operations")
    return operations


def _as_json(result: Edit, *, dry_run: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": str(result.path),
        "dry_run": dry_run,
        "how": result.how,
        "changes": list(result.changes),
        "undo": list(result.undo),
    }
