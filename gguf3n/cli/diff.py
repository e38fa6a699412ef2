"""`gguf3n diff`: how two GGUF files differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, print_json, shape_text
from gguf3n.cli.paint import cut, line_width, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import FindingsError
from gguf3n.inspection.diff import Difference, KeyChange, TensorChange
from gguf3n.inspection.diff import diff as run_diff

SCHEMA = "gguf3n.diff/1"
SHOWN = 40


def diff(
    a: Annotated[str, typer.Argument(help="A GGUF file: a path, an https URL, or ORG/REPO[:QUANT].")],
    b: Annotated[str, typer.Argument(help="Another.")],
    data: Annotated[bool, typer.Option("--data", help="Compare the tensors' values too, worst first.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare two GGUF files. Exit code 0: the same content; 12: not."""
    with progress_bar(quiet=quiet or not data) as progress:
        difference = run_diff(a, b, with_data=data, progress=progress)
    if json:
        print_json(_as_json(difference))
    else:
        _print(difference)
    if not difference.same_content:
        raise typer.Exit(FindingsError.exit_code)


def _print(difference: Difference) -> None:
    if difference.keys:
        _print_lines("keys", [_key_line(change) for change in difference.keys])
    if difference.tokens:
        rows = [(str(t.id), _row(t.before), "→", _row(t.after)) for t in difference.tokens]
        _print_lines("tokens, the first that differ", list(columns(rows, "><<<")))
    if difference.tensors:
        rows = [(change.name, *_tensor_row(change)) for change in difference.tensors]
        _print_lines("tensors", list(columns(rows, "<<<>")))
    if difference.layout:
        _print_lines("layout", list(difference.layout))
    what = "keys, vocabulary, tensors and values" if difference.with_data else "keys, vocabulary, tensors"
    if difference.equal:
        say(f"the same: {what}")
    elif difference.same_content:
        say(f"the same content ({what}), laid out in another way")
    else:
        say("different: " + ", ".join(filter(None, (_keys_count(difference), _tensors_count(difference)))))


def _keys_count(difference: Difference) -> str:
    return f"{len(difference.keys)} keys" if difference.keys else ""


def _tensors_count(difference: Difference) -> str:
    """How equal the weights are: of a slice and the model that it should be, nothing else matters."""
    if not difference.tensors:
        return f"values of all {difference.n_tensors} tensors the same" if difference.with_data else ""
    errors = [change.error for change in difference.tensors if change.error is not None]
    largest = f", relative errors up to {max(errors):.3g}" if errors else ""
    return f"{len(difference.tensors)} of {difference.n_tensors} tensors{largest}"


def _print_lines(title: str, lines: list[str]) -> None:
    say(paint(title, "bold"))
    for line in lines[:SHOWN]:
        say(cut(f"  {line}", line_width()))
    if len(lines) > SHOWN:
        say(f"  and {len(lines) - SHOWN} more")
    say("")


def _key_line(change: KeyChange) -> str:
    before, after = change.types
    if before is None:
        return f"+ {change.name} {after} {change.values[1]!r}"
    if after is None:
        return f"- {change.name} {before} {change.values[0]!r}"
    if change.n_items:
        return f"  {change.name}: {change.n_items:,} items differ"
    if before != after:
        return f"  {change.name}: {before} {change.values[0]!r} → {after} {change.values[1]!r}"
    return f"  {change.name}: {change.values[0]!r} → {change.values[1]!r}"


def _row(row: tuple[Any, ...]) -> str:
    return " ".join(repr(cell) if isinstance(cell, str) else f"{cell:g}" for cell in row) or "-"


def _tensor_row(change: TensorChange) -> tuple[str, str, str]:
    shapes = list(dict.fromkeys("-" if shape is None else shape_text(shape) for shape in change.shapes))
    types = list(dict.fromkeys(qtype or "-" for qtype in change.types))
    error = "" if change.error is None else f"{change.error:.3g}"
    return " → ".join(types), " → ".join(shapes), error


def _as_json(difference: Difference) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "paths": list(difference.names),
        "equal": difference.equal,
        "same_content": difference.same_content,
        "with_data": difference.with_data,
        "n_tensors": difference.n_tensors,
        "keys": [
            {
                "name": change.name,
                "types": list(change.types),
                "values": list(change.values),
                "different_items": change.n_items,
            }
            for change in difference.keys
        ],
        "tokens": [
            {"id": change.id, "before": list(change.before), "after": list(change.after)}
            for change in difference.tokens
        ],
        "tensors": [
            {
                "name": change.name,
                "types": list(change.types),
                "shapes": [None if shape is None else list(shape) for shape in change.shapes],
                "relative_error": change.error,
            }
            for change in difference.tensors
        ],
        "layout": list(difference.layout),
    }
