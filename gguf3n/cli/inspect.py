"""`gguf3n inspect`: what a GGUF file holds, wherever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gguf3n.cli.console import columns, human_bytes, print_json, shape_text
from gguf3n.cli.paint import cut, line_width, paint, say, say_exactly
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, open_gguf
from gguf3n.inspection import summary
from gguf3n.outside import printable

SCHEMA = "gguf3n.inspect/1"
HEAD_ITEMS = 16
GLOBS_HELP = "Patterns such as 'tokenizer.*': of --keys and --tensors show only matching names."
LAYER_PREFIXES = ("attn_", "ffn_")
"""Left out in the grid's headings, where the rest is clear."""


def inspect(
    file: Annotated[str, typer.Argument(help="A GGUF file: a path, an https URL, or ORG/REPO[:FILE or QUANT].")],
    globs: Annotated[list[str] | None, typer.Argument(metavar="[GLOB]...", help=GLOBS_HELP)] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Metadata keys with types and values.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Tensors with shapes, types and sizes.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Which layer has which types.")] = False,
    tokens: Annotated[str | None, typer.Option(metavar="N[:M]", help="Tokens N to M.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="The chat template, as it is.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON result on stdout, arrays in full.")] = False,
) -> None:
    """Show what a GGUF file holds: a summary, or the views that are asked for. Reads the header only."""
    wanted = [
        name
        for name, yes in (
            ("keys", keys),
            ("tensors", tensors),
            ("layers", layers),
            ("tokens", tokens is not None),
            ("chat_template", chat_template),
        )
        if yes
    ]
    span = _span(tokens) if tokens is not None else (0, 0)
    if globs and not (keys or tensors):
        raise UsageError("patterns without --keys or --tensors", found=" ".join(globs), fix="add the view they filter")
    gguf = open_gguf(file)
    if json:
        print_json(_as_json(gguf, wanted, globs or [], span))
        return
    if not wanted:
        _print_summary(gguf)
    for number, view in enumerate(wanted):
        if number:
            say("")
        if view == "keys":
            _print_keys(gguf, globs or [])
        elif view == "tensors":
            _print_tensors(gguf, globs or [])
        elif view == "layers":
            _print_layers(gguf)
        elif view == "tokens":
            _print_tokens(gguf, span)
        else:
            say_exactly(_template(gguf) or "")


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
        raise UsageError("--tokens wants one id or two", expected="N or N:M", found=text)
    return int(first), int(last or first)


def _print_summary(gguf: GGUFFile) -> None:
    parts = f", {len(gguf.parts)} parts" if len(gguf.parts) > 1 else ""
    say(paint(gguf.name, "bold"))
    say(
        f"  GGUF version {gguf.version}, {gguf.byte_order}-endian, {len(gguf.keys)} keys, "
        f"{len(gguf.tensors)} tensors{parts}"
    )
    say(f"  {human_bytes(gguf.file_bytes)} ({gguf.file_bytes:,} bytes), header {human_bytes(gguf.header_bytes)}")
    say(f"  {gguf.n_weights:,} weights, {gguf.bits_per_weight:.2f} bits a weight", "")
    for line in columns([(f"  {label}", value) for label, value in summary.facts(gguf)], "<<"):
        say(cut(line, line_width()))
    rows = [("  type", "tensors", "weights", "size", "share")]
    total = sum(tensor.n_bytes for tensor in gguf.all_tensors)
    for count in summary.type_counts(gguf):
        share = f"{count.n_bytes / max(total, 1):.1%}"
        size = human_bytes(count.n_bytes)
        rows.append((f"  {count.qtype.name}", str(count.n_tensors), f"{count.n_weights:,}", size, share))
    say("")
    _print_table(rows, "<>>>>")


def _print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    for number, line in enumerate(columns(rows, align)):
        say(paint(cut(line, line_width()), "bold") if number == 0 else cut(line, line_width()))


def _print_keys(gguf: GGUFFile, globs: Sequence[str]) -> None:
    names = summary.matching(list(gguf.keys), globs)
    shown = [gguf.keys[name] for name in names]
    for line in columns(
        [(key.name, _short_type(key), _shortened(key)) for key in shown] or [("no keys", "", "")], "<<<"
    ):
        say(cut(line, line_width()))


def _short_type(key: GGUFKey) -> str:
    return f"[{key.value.element_type.name.lower()}]" if isinstance(key.value, GGUFArray) else key.type_name


def _print_tensors(gguf: GGUFFile, globs: Sequence[str]) -> None:
    rows = [("name", "shape", "type", "size")]
    for name in summary.matching(list(gguf.tensors), globs):
        tensor = gguf.tensors[name]
        rows.append((name, shape_text(tensor.shape), tensor.qtype.name, human_bytes(tensor.n_bytes)))
    _print_table(rows, "<><>")


def _print_layers(gguf: GGUFFile) -> None:
    grid = summary.layer_grid(gguf)
    headings = [_short(name, grid.columns) for name in grid.columns]
    rows: list[tuple[str, ...]] = [("layer", *headings)]
    for run in grid.runs:
        label = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
        rows.append((label, *(name or "-" for name in run.types)))
    if grid.columns:
        _print_table(_narrowed(rows), ">" + "<" * len(headings))
    for qtype, names in grid.constant.items():
        _print_names(f"{qtype} in every layer:", names)
    by_type: dict[str, list[str]] = {}
    for name, qtype in grid.globals.items():
        by_type.setdefault(qtype, []).append(name)
    for qtype, outside in by_type.items():
        _print_names(f"{qtype} outside the layers:", outside)


def _short(name: str, others: Sequence[str]) -> str:
    for prefix in LAYER_PREFIXES:
        bare = name.removeprefix(prefix)
        if bare != name and bare not in others:
            return {"output": "out"}.get(bare, bare)
    return name


def _narrowed(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the parts of type names that a line has no room for: underscores, then nothing."""
    width = sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2
    if width <= line_width():
        return rows
    return [rows[0], *((row[0], *(cell.replace("_", "") for cell in row[1:])) for row in rows[1:])]


def _print_names(label: str, names: Sequence[str]) -> None:
    line = paint(label, "bold")
    used = len(label)
    for name in map(printable, names):
        if used + 1 + len(name) > line_width():
            say(line)
            line, used = "   ", 3
        line, used = f"{line} {name}", used + 1 + len(name)
    say(line)


def _print_tokens(gguf: GGUFFile, span: tuple[int, int]) -> None:
    rows = [("id", "type", "score", "text")]
    for token in summary.tokens(gguf, *span):
        score = "" if token.score is None else f"{token.score:g}"
        rows.append((str(token.id), token.type or "", score, repr(token.text)))
    _print_table(rows, "><><")


def _template(gguf: GGUFFile) -> str | None:
    key = gguf.keys.get("tokenizer.chat_template")
    return None if key is None or not isinstance(key.value, str) else key.value


def _shortened(key: GGUFKey) -> str:
    """A value on one line; arrays by their beginning and their length."""
    value = key.value
    if not isinstance(value, GGUFArray):
        return _item(value)
    items = ", ".join(_item(item) for item in value.head(HEAD_ITEMS))
    more = ", …" if len(value) > HEAD_ITEMS else ""
    return f"({len(value):,}) [{items}{more}]"


def _item(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    return repr(value) if isinstance(value, str) else str(value)


def _as_json(gguf: GGUFFile, wanted: Sequence[str], globs: Sequence[str], span: tuple[int, int]) -> dict[str, Any]:
    """The documented schema; without views asked for, all but the tokens."""
    views = wanted or ("keys", "tensors", "layers", "chat_template")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "path": gguf.name,
        "parts": len(gguf.parts),
        "version": gguf.version,
        "byte_order": gguf.byte_order,
        "alignment": gguf.alignment,
        "file_bytes": gguf.file_bytes,
        "header_bytes": gguf.header_bytes,
        "architecture": summary.architecture(gguf),
        "encoders": dict(summary.encoder_facts(gguf)) or None,
        "adapter": dict(summary.adapter_facts(gguf)) or None,
        "n_weights": gguf.n_weights,
        "bits_per_weight": round(gguf.bits_per_weight, 4),
        "types": {
            count.qtype.name: {"tensors": count.n_tensors, "weights": count.n_weights, "bytes": count.n_bytes}
            for count in summary.type_counts(gguf)
        },
    }
    if "keys" in views:
        result["keys"] = {
            name: {"type": gguf.keys[name].type_name, "value": gguf.keys[name].value}
            for name in summary.matching(list(gguf.keys), globs)
        }
    if "tensors" in views:
        result["tensors"] = [
            {
                "name": name,
                "shape": list(gguf.tensors[name].shape),
                "type": gguf.tensors[name].qtype.name,
                "part": gguf.tensors[name].part,
                "offset": gguf.tensors[name].offset,
                "bytes": gguf.tensors[name].n_bytes,
            }
            for name in summary.matching(list(gguf.tensors), globs)
        ]
    if "layers" in views:
        grid = summary.layer_grid(gguf)
        result["layers"] = [
            {"first": run.first, "last": run.last, "types": dict(zip(grid.columns, run.types, strict=True))}
            for run in grid.runs
        ]
    if "tokens" in views:
        result["tokens"] = [vars(token) for token in summary.tokens(gguf, *span)]
    if "chat_template" in views:
        result["chat_template"] = _template(gguf)
    return result
